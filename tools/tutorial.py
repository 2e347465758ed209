"""Writes docs/tutorial.md from the scenarios of the tutorial and the report of a run of them.

    testbed run scenarios/tutorial --report DIR && python tools/tutorial.py DIR/scenario.json > docs/tutorial.md

The text between commands is in the scenarios: comments are for those who change them, `row` and `name` for readers, and
scenarios/tutorial/notes.yaml says for each row what to look at. Outputs are those of the run. tests/unit/test_tutorial.py
renders the page anew from the scenarios and the outputs in it, and compares.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
COURSE = ROOT / "scenarios" / "tutorial"
_MOST_LINES = 24

HEAD = """\
# The tutorial

<!-- written by tools/tutorial.py from a run of scenarios/tutorial: change those -->

Kubernetes Services from kube-proxy to Ingress, in {rows} rows, by hand. `testbed run scenarios/tutorial` does all of it and
checks each output's form. To follow along, in the folder of a chapter:

```
testbed up tutorial -t tutorial        # without ip_vs: testbed vm -- bash -c 'testbed up tutorial -t tutorial; exec bash'
eval "$(testbed env tutorial)"         # your own kubectl
```

`client` is a machine outside the cluster on the same LAN, `openeuler-1` to `openeuler-3` are the nodes. Names of pods,
addresses of Services, ports and times differ from run to run. Under each row: what to look at, and how.
"""

Outputs = Mapping[tuple[str, int], str]
"""By scenario and number of the step."""


def render(outputs: Outputs) -> str:
    """Return the page with these outputs."""
    notes = yaml.safe_load((COURSE / "notes.yaml").read_text())
    parts: list[str] = []
    rows = 0
    for file in sorted(COURSE.glob("*/scenario.yaml")):
        document = yaml.safe_load(file.read_text())
        name = document["metadata"]["name"]
        mode = document["spec"]["proxyModes"][0]
        parts.append(f"## {name.partition('-')[2].replace('-', ' ').capitalize()}\n\n{notes[name]}")
        steps = [step for step in document["spec"]["steps"] if mode in step.get("modes", [mode])]
        for number, step in enumerate(steps, 1):
            if "row" in step:
                rows += 1
                title = step["row"].partition(" ")
                parts.append(f"### {title[0]}. {title[2]}")
                if (note := notes.get(int(title[0]))) is not None:
                    parts.append(note.strip())
            parts.append(_step(step, outputs.get((name, number), "")))
    text = "\n\n".join(part for part in parts if part)
    return HEAD.format(rows=rows) + "\n" + text + "\n"


def _step(step: Mapping[str, Any], output: str) -> str:
    said = f"{step['name'][0].upper()}{step['name'][1:]}:\n\n" if "name" in step else ""
    if "kubectl" in step:
        command = f"kubectl {_words(step['kubectl']['run'])}"
        if "editor" in step["kubectl"]:
            command = f"KUBE_EDITOR={shlex.quote(step['kubectl']['editor'])} {command}"
        if "each" in step["kubectl"]:
            said = f"{said}For each pod of {step['kubectl']['each']}, in the order of their names:\n\n"
        return said + _block(command, output)
    if "exec" in step:
        return said + _block(f"testbed exec {step['exec']['in']} -- {_words(step['exec']['run'])}", output)
    if "apply" in step:
        files = [step["apply"]] if isinstance(step["apply"], str) else step["apply"]
        return _block("kubectl apply " + " ".join(f"-f {file}" for file in files), "")
    if "expect" in step and "tcp" not in step["expect"]:  # that one waits for what the next step needs
        return said + _question(step["expect"])
    return ""


def _words(run: str | list[str]) -> str:
    """Return a command as it is typed, with the names of kept outputs in capitals: {{pod-ip}} is POD-IP."""
    text = run if isinstance(run, str) else shlex.join(run).replace("'{{pod}}'", "{{pod}}")
    return re.sub(r"\{\{([a-z-]+)\}\}", lambda match: match[1].upper(), text)


def _question(expect: Mapping[str, Any]) -> str:
    """Return an expectation as what a person would type for it; how often, and who answers, is said behind it."""
    where = f"testbed exec {expect['from']} --"
    if "arp" in expect:
        return (
            _block(f"{where} arping -c 1 {expect['arp']}", "")
            + f"\n\nAnswered by {', '.join(expect['answeredBy'])} only."
        )
    if "resolve" in expect:
        kind = f" -t {expect['type']}" if "type" in expect else ""
        return _block(f"{where} dig +search +short{kind} {expect['resolve']}", "")
    headers = "".join(f" -H {shlex.quote(f'{key}: {value}')}" for key, value in (expect.get("headers") or {}).items())
    times = f" # {expect['times']} times" if "times" in expect else ""
    who = expect.get("answeredBy") or {}
    said = {"each": "Every pod answers", "same": "Always the same pod answers"}
    end = "".join(f"\n\n{said[share]}." for share in said if share in who)
    status = f"\n\nStatus {expect['status']}." if "status" in expect else ""
    return _block(f"{where} curl -s{headers} {expect['get']}{times}", "") + end + status


def _block(command: str, output: str) -> str:
    lines = [line.rstrip() for line in output.rstrip().splitlines()]
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], "…"]
    return "\n".join(["```", f"$ {command}", *lines, "```"])


def outputs_of_run(report: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    """Return what programs wrote in a run, of each scenario in the first of its modes."""
    first = {}
    for file in COURSE.glob("*/scenario.yaml"):
        document = yaml.safe_load(file.read_text())
        first[document["metadata"]["name"]] = document["spec"]["proxyModes"][0]
    return {
        (result["scenario"], step["number"]): step["output"]
        for result in report["results"]
        if first.get(result["scenario"]) == result["mode"]
        for step in result["steps"]
        if step["output"].strip()
    }


_CHANGING = (
    (r"\b\d+(?:m|h|d|ms)?\d*s\b|\b\d+m\b", "AGE"),
    (r"-[0-9a-f]{8,10}-[a-z0-9]{5}\b|-[a-z0-9]{5}\b(?= )", "-HASH"),
    (r"\b(?:10\.96|100|192\.168)(?:\.\d+){2,3}\b", "ADDRESS"),
    (r":3\d{4}\b|^3\d{4}$", ":PORT"),
    (r"\d\d\d\d-\d\d-\d\dT[\d:]+Z", "TIME"),
    (r"\b[\d.]+(?=(?:us|ms|MB|KB|k|%|\b))", "N"),
    (r"\bNk\b", "N"),
    (r"\b[KMG]?Bytes\b", "BYTES"),
    (r" \(AGE ago\)", ""),
    # what newer kubectls say and older ones do not, and the other way round
    (r"(?<=deleted) from [a-z-]+ namespace$", ""),
    (r"^ *creationTimestamp: null\n", ""),
    (r"^Internal Traffic Policy: .*\n", ""),
    (r"[ \t]+", " "),
)


def normalized(page: str) -> list[str]:
    """Return a page's lines with what differs from run to run taken out; the order of rows in a block is of no matter."""
    for pattern, word in _CHANGING:
        page = re.sub(pattern, word, page, flags=re.MULTILINE)
    return sorted(page.splitlines())


def main() -> int:
    report = json.loads(Path(sys.argv[1]).read_text())
    sys.stdout.write(render(outputs_of_run(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
