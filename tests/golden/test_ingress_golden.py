"""Whole configurations, to be read in review; nginx itself reads each of them too."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from ingress_cases import CASES
from ingress_objects import Object, conf, document, key_pair

from testbed.dataplane.ingress.render import render, render_generation
from testbed.dataplane.ingress.tokens import parse

FOLDER = Path(__file__).parent / "ingress"


@pytest.mark.parametrize("name", CASES)
def test_golden_configuration(name: str, request: pytest.FixtureRequest) -> None:
    """These objects make this configuration, byte for byte, in whatever order they come."""
    text = conf(*CASES[name])
    file = FOLDER / f"{name}.conf"
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), f"pytest --update-golden rewrites {file}, for review"
    assert conf(*reversed(CASES[name])) == text


@pytest.mark.root
@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed (Debian package nginx-light)")
@pytest.mark.parametrize("name", CASES)
def test_nginx_accepts_it(name: str, tmp_path: Path) -> None:
    """nginx -t accepts each golden configuration, and reads the words that our own reader reads."""
    done = check(CASES[name], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr, done.stderr


def check(objects: list[Object], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run nginx -t on the configuration of these objects, with its absolute paths moved below a folder."""
    _, certificate, key = key_pair("fake.local")
    made = document(*objects)
    text = render(made)
    parse(text)
    files = {**made.files, "/etc/nginx/generation.conf": render_generation(1).encode()}
    if not made.default_certificate:
        (folder / "fake.pem").write_bytes(certificate + key)
        text = text.replace('ssl_certificate "";', f"ssl_certificate {folder}/fake.pem;")
        text = text.replace('ssl_certificate_key "";', f"ssl_certificate_key {folder}/fake.pem;")
    for path, content in files.items():
        moved = folder / path.lstrip("/")
        moved.parent.mkdir(parents=True, exist_ok=True)
        moved.write_bytes(content)
        text = text.replace(path, str(moved))
    (folder / "work").mkdir(exist_ok=True)
    text = text.replace("/tmp/nginx/", f"{folder}/work/").replace("/dev/stdout", f"{folder}/access.log")
    (folder / "nginx.conf").write_text(text)
    return subprocess.run(
        ["nginx", "-t", "-c", str(folder / "nginx.conf")], capture_output=True, text=True, timeout=30, check=False
    )
