"""What the ingress webhook refuses, in which words; and that nothing refused could have done harm anyway."""

# ruff: noqa: E501, SIM905  # whole messages, in tables

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingress_objects import CLASS, OPTIONS, Object, conf, config_map, ingress, secret, service, slices
from ingress_objects import settings as controller_settings

from testbed.dataplane.ingress.admission import MAX_BYTES, IngressWebhook, deny_reason
from testbed.dataplane.ingress.annotations import PREFIX, known_annotations, parse_annotations
from testbed.dataplane.ingress.settings import Options, parse_settings
from testbed.dataplane.ingress.tokens import Directive, SyntaxProblem, parse
from testbed.dataplane.ingress.world import World
from testbed.model.objects import BY_KEY
from testbed.registry.admission import AdmissionRequest
from testbed.store import Store

WEB = [service("a"), slices("a", "10.0.0.1", "10.0.0.2")]
ROOT = [("/", "Prefix", "a")]


def denied(candidate: Object, *others: Object, options: Options = OPTIONS) -> str:
    return deny_reason(candidate, World.of([CLASS, *WEB, *others]), options)


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        ({"limit-rps": "abc"}, 'annotation nginx.ingress.kubernetes.io/limit-rps contains invalid value \'abc\': must be a whole number from 1 to 1000000'),
        ({"proxy-body-size": "8x"}, "proxy-body-size contains invalid value '8x': must be a number of bytes"),
        ({"server-snippet": "return 200;"}, "nginx.ingress.kubernetes.io/server-snippet annotation cannot be used. Snippet directives are disabled by the Ingress administrator"),
        ({"configuration-snippet": ""}, "nginx.ingress.kubernetes.io/configuration-snippet annotation cannot be used"),
        ({"permanent-redirect": "https://a.com/;return 200"}, "permanent-redirect contains invalid value"),
        ({"rewrite-target": "/$2\r\n}"}, "must not contain control characters, found '\\r'"),
        ({"rewrite-target": "/$request_uri"}, "rewrite-target contains invalid value"),
        ({"upstream-hash-by": "$nothing"}, "variable $nothing is not known"),
        ({"auth-url": "http://$host/"}, "must name its host"),
        ({"auth-tls-match-cn": "CN=x #"}, "auth-tls-match-cn contains invalid value"),
        ({"canary-by-header-pattern": "(unclosed"}, "must be a regular expression"),
        ({"whitelist-source-range": "10.0.0.0/8,nonsense"}, "must be an address or a CIDR, found 'nonsense'"),
        ({"session-cookie-name": "a b"}, "must be letters, digits, - and _"),
        ({"cors-allow-origin": "https://*"}, "must be *, null, or an origin"),
    ],
)  # fmt: skip
def test_a_bad_annotation_is_named(annotations: dict[str, str], said: str) -> None:
    """The message holds the annotation's name, its value, and what would be right."""
    assert said in denied(ingress("x", {"a.com": ROOT}, annotations))


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"a.com": [("/x y", "Prefix", "a")]}, "spec.rules[0].http.paths[0].path: '/x y': path /x y cannot be used with pathType Prefix"),
        ({"a.com": [("/", "Prefix", "a"), ('/"}', "Exact", "a")]}, "spec.rules[0].http.paths[1].path"),
        ({"a.com": [("/a\\b", "ImplementationSpecific", "a")]}, "must not contain blanks, quotes"),
        ({"a.com": [("/a\nb", "ImplementationSpecific", "a")]}, "must not contain control characters, found '\\n'"),
        ({"a.com": [("/etc/passwd", "ImplementationSpecific", "a")]}, "ingress contains invalid spec.rules[0].http.paths[0].path"),
        ({"a.com": [("/ alias /etc;", "ImplementationSpecific", "a")]}, "matches (?:^|[\\s;{])alias"),
        ({"a.com": [("/x_by_lua", "ImplementationSpecific", "a")]}, "matches _by_lua"),
        ({'a.com"; }': ROOT}, "spec.rules[0].host"),
        ({"A.com": ROOT}, "spec.rules[0].host"),
    ],
)  # fmt: skip
def test_a_bad_path_or_host_is_named(rules: dict[str, Any], said: str) -> None:
    """The message holds the field."""
    assert said in denied(ingress("x", rules))


def test_the_same_host_and_path_belongs_to_one_ingress() -> None:
    """A second Ingress is refused with the first one's name; canaries, updates and others' Ingresses are not."""
    first = ingress("other", {"www.itopenlab.com": ROOT})
    second = ingress("mine", {"www.itopenlab.com": ROOT})
    assert denied(second, first) == (
        'host "www.itopenlab.com" and path "/" is already defined in ingress dev/other'
    )  # fmt: skip
    assert denied(ingress("mine", {"www.itopenlab.com": ROOT}, {"canary": "true"}), first) == ""
    assert denied(ingress("other", {"www.itopenlab.com": ROOT}), first) == ""
    assert denied(second, ingress("other", {"www.itopenlab.com": ROOT}, ingress_class="traefik")) == ""
    two = [ingress(name, {"c.com": ROOT}, {"canary": "true"}) for name in ("one", "two")]
    assert "already defined in ingress dev/one" in denied(two[1], two[0])


def test_only_our_own_ingresses_are_looked_at() -> None:
    """What another controller's Ingress says is not ours to judge."""
    assert denied(ingress("x", {"a.com": ROOT}, {"limit-rps": "abc"}, ingress_class="traefik")) == ""
    assert denied(ingress("x", {"a.com": ROOT}, {"limit-rps": "abc"}, ingress_class=None)) == ""
    old = {"kubernetes.io/ingress.class": "nginx", "limit-rps": "abc"}
    assert "limit-rps" in denied(ingress("x", {"a.com": ROOT}, old, ingress_class=None))


def test_other_refusals() -> None:
    """Size, catch-all, UID, words and risk each have a check."""
    huge = ingress("x", {"a.com": ROOT})
    huge["metadata"]["annotations"]["note"] = "x" * MAX_BYTES
    assert "too large" in denied(huge)
    catch_all = ingress("x", defaultBackend={"service": {"name": "a", "port": {"number": 80}}})
    assert "catch-all" in denied(catch_all, options=Options(disable_catch_all=True))
    assert denied(catch_all) == ""
    odd = ingress("x", {"a.com": ROOT})
    odd["metadata"]["uid"] = 'x"; }'
    assert "metadata.uid" in denied(odd)
    words = controller_settings(annotation_value_word_blocklist="secret,root")
    redirect = ingress("x", {"a.com": ROOT}, {"permanent-redirect": "https://a.com/root"})
    assert "contains invalid word root" in denied(redirect, words)
    cautious = controller_settings(annotations_risk_level="Low")
    assert denied(redirect, cautious) == (
        "annotation nginx.ingress.kubernetes.io/permanent-redirect is too risky for environment"
    )  # fmt: skip


def test_the_webhook_reads_flags_from_the_controllers_pod() -> None:
    """The class and ConfigMap are those of the running controller; without one nothing is ours."""
    store = Store(now=lambda: "2026-01-01T00:00:00Z", new_uid=lambda: "u")
    for key, obj in (("ingressclasses.networking.k8s.io", {**CLASS, "metadata": {"name": "nginx"}}),):
        store.create(key, obj)
    webhook = IngressWebhook(store)
    bad = ingress("x", {"a.com": ROOT}, {"limit-rps": "abc"})
    request = AdmissionRequest(
        operation="CREATE", resource=BY_KEY["ingresses.networking.k8s.io"], namespace="dev", name="x", object=bad, old=None,
    )  # fmt: skip
    assert webhook(request) is None
    args = ["/nginx-ingress-controller", "--validating-webhook=:8443", "--configmap=$(POD_NAMESPACE)/c"]
    pod = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "c", "namespace": "ingress-nginx"},
        "spec": {"containers": [{"name": "c", "image": "registry.k8s.io/ingress-nginx/controller:v1.10.1@sha256:00", "args": args}]},
    }  # fmt: skip
    store.create("pods", pod)
    denial = webhook(request)
    assert denial is not None and (denial.code, denial.reason) == (400, "BadRequest") and "limit-rps" in denial.message


# --- injection ---------------------------------------------------------------------------------------------------------

HOSTILE = [
    '"; }', '";}}server{listen 81;location /{root /etc;}}#', "\n}\nserver { listen 81; }\n", "\r\nroot /;", "; alias /etc/;", "{", "}",
    "#", "$host", "${literal_dollar}", "\\", '\\"', "\\\\\";", "'", "' ; }", "`id`", "$(id)", "a b", "\t", "\x00", "\x0b", "\x85", "\u2028",
    "http://a/\" ; }", "http://127.0.0.1/#;\nload_module /tmp/x.so;", "https://a.com/$host;", 'CN=x";ssl_engine x;#', "*", "..", "../../etc/passwd",
    "/etc/passwd", "/var/run/secrets", "x_by_lua_block {", "%0a", "%22", "default", "hostnames", "include /etc/passwd", "~", "~*(", "(?i)",
    "include", "on;", "off }", "1;", "1k;", "-1", "9" * 40, "a" * 9000, "$1$2$3", "/$1\\", "$$", "${", "${x", "$http_x;",
]  # fmt: skip
VALUED = sorted(set(known_annotations()))


def skeleton(directives: list[Directive]) -> Counter[tuple[str, int]]:
    """Return how often each directive occurs at each depth: what no user's text may change beyond its own feature."""
    found: Counter[tuple[str, int]] = Counter()

    def walk(level: list[Directive], depth: int) -> None:
        for one in level:
            # in blocks of maps and the like the first word is a value
            is_value = depth > 0 and one.block is None and one.name[:1] in '~"0123456789'
            found[("value" if is_value else one.name, depth)] += 1
            if one.block is not None and one.name not in ("map", "geo", "split_clients"):
                walk(one.block, depth + 1)

    walk(directives, 0)
    return found


#: Every directive that our template can write; nothing else may ever be read back.
KNOWN = {
    *"pid daemon worker_processes worker_shutdown_timeout error_log events http worker_connections multi_accept use include".split(),
    *"default_type client_body_temp_path proxy_temp_path fastcgi_temp_path uwsgi_temp_path scgi_temp_path aio tcp_nodelay".split(),
    *"tcp_nopush reset_timedout_connection keepalive_timeout keepalive_requests client_header_buffer_size client_header_timeout".split(),
    *"client_body_timeout client_body_buffer_size client_max_body_size large_client_header_buffers underscores_in_headers".split(),
    *"ignore_invalid_headers server_tokens server_name_in_redirect port_in_redirect types_hash_max_size server_names_hash_max_size".split(),
    *"server_names_hash_bucket_size map_hash_bucket_size map_hash_max_size variables_hash_bucket_size variables_hash_max_size".split(),
    *"proxy_headers_hash_max_size proxy_headers_hash_bucket_size resolver resolver_timeout gzip gzip_comp_level gzip_min_length".split(),
    *"gzip_proxied gzip_vary gzip_types proxy_cache_path geo map split_clients limit_req_zone limit_conn_zone limit_req_status".split(),
    *"limit_conn_status log_format access_log log_not_found real_ip_header real_ip_recursive set_real_ip_from ssl_protocols".split(),
    *"ssl_ciphers ssl_prefer_server_ciphers ssl_session_cache ssl_session_timeout ssl_session_tickets ssl_buffer_size".split(),
    *"ssl_ecdh_curve proxy_http_version proxy_ssl_server_name proxy_ssl_session_reuse proxy_redirect proxy_cookie_domain".split(),
    *"proxy_cookie_path proxy_connect_timeout proxy_send_timeout proxy_read_timeout proxy_buffering proxy_request_buffering".split(),
    *"proxy_buffer_size proxy_buffers proxy_busy_buffers_size proxy_max_temp_file_size proxy_next_upstream".split(),
    *"proxy_next_upstream_timeout proxy_next_upstream_tries proxy_set_header add_header deny allow upstream server keepalive hash".split(),
    *"random listen server_name ssl_certificate ssl_certificate_key ssl_reject_handshake set if return location satisfy auth_basic".split(),
    *"auth_basic_user_file auth_request auth_request_set error_page limit_req limit_conn limit_rate limit_rate_after mirror".split(),
    *"mirror_request_body proxy_intercept_errors rewrite proxy_pass grpc_pass grpc_set_header grpc_connect_timeout".split(),
    *"grpc_send_timeout grpc_read_timeout grpc_next_upstream grpc_next_upstream_tries grpc_next_upstream_timeout fastcgi_pass".split(),
    *"fastcgi_connect_timeout fastcgi_send_timeout fastcgi_read_timeout fastcgi_next_upstream fastcgi_next_upstream_tries".split(),
    *"fastcgi_next_upstream_timeout internal proxy_cache proxy_cache_key proxy_cache_valid proxy_ignore_headers".split(),
    *"proxy_pass_request_body proxy_method ssl_client_certificate ssl_verify_client ssl_verify_depth stub_status".split(),
}  # fmt: skip
LISTENS = Counter(["80", "443", "8181", "127.0.0.1:10246"])


def assert_inert(candidate: Object, *others: Object) -> None:
    """Fail when the generator, given this object past all admission, writes anything that is not its own."""
    text = conf(*WEB, service("b"), slices("b", "10.0.1.1"), *others, candidate)
    assert not any(char in text for char in "\r\x00\x0b\x85\u2028"), "a control character reached the file"
    read = parse(text)
    every = [one for top in read for one in top.walk()]
    inside_values = {
        id(one) for top in every if top.name in ("map", "geo", "split_clients", "types") for one in top.block or ()
    }
    for one in every:
        if id(one) not in inside_values:
            assert one.name in KNOWN, f"line {one.line}: {one.words}"
    assert {one.words[1] for one in every if one.name == "listen"} <= set(LISTENS)
    assert [one.words[1] for one in every if one.name == "include"] == [
        "/etc/nginx/mime.types",
        "/etc/nginx/generation.conf",
    ] or any(one.name == "fastcgi_pass" for one in every)
    for one in every:
        if one.name == "return":
            assert one.words[1].isdigit() or one.words[1].startswith("$"), one.words


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:30])
def test_hostile_text_in_any_annotation_is_refused_or_inert(value: str) -> None:
    """Each hostile text in each annotation, alone and at the end of something harmless."""
    for name in VALUED:
        for text in (value, f"https://a.com/{value}", f"CN=x{value}"):
            _, problems = parse_annotations({name: text})
            if problems:
                assert name in problems[0].message  # and the generator goes on without it
                continue
            assert_inert(ingress("x", {"a.com": ROOT}, {name: text, PREFIX + "enable-cors": "true"}))
    everything = ingress("x", {"a.com": ROOT}, dict.fromkeys(VALUED, value))
    assert_inert(everything)


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:30])
def test_hostile_text_in_paths_hosts_and_names_is_refused_or_inert(value: str) -> None:
    """Also in fields that the API itself would refuse: Secrets' names, hosts, backends, UIDs, ConfigMaps."""
    for kind in ("Prefix", "Exact", "ImplementationSpecific"):
        for extra in ({}, {"use-regex": "true"}, {"rewrite-target": "/"}):
            assert_inert(ingress("x", {"a.com": [(f"/{value}", kind, "a")]}, extra))
    assert_inert(ingress("x", {value: ROOT, f"*.{value}": ROOT}))
    assert_inert(ingress("x", {"a.com": [("/", "Prefix", value)]}))
    assert_inert(ingress("x", {"a.com": ROOT}, tls=[{"hosts": [value, "a.com"], "secretName": value}]))
    odd = ingress("x", {"a.com": ROOT})
    odd["metadata"]["uid"] = value
    assert_inert(odd)
    assert_inert(
        ingress("x", {"a.com": ROOT}, {"auth-url": "http://a.b/", "auth-proxy-set-headers": "h", "custom-headers": "h"}),
        config_map("h", {"X-A": value, value: "x"}), controller_settings(global_allowed_response_headers="X-A"),
    )  # fmt: skip
    assert_inert(
        ingress("x", {"a.com": ROOT}, {"auth-type": "basic", "auth-secret": "s", "auth-secret-type": "auth-map"}),
        secret("s", {value: b"x", "ann": value.encode()}),
    )
    assert_inert(
        ingress("x", {"a.com": [("/", "Prefix", "far")]}), service("far", type="ExternalName", externalName=value)
    )


def test_hostile_text_in_the_configmap_is_refused_or_inert() -> None:
    """Every key of the ConfigMap with every hostile text."""
    from dataclasses import fields

    from testbed.dataplane.ingress.settings import Settings

    for value in HOSTILE:
        data = {one.name.replace("_", "-"): value for one in fields(Settings)}
        _, notes = parse_settings(data)
        assert notes
        assert_inert(
            ingress("x", {"a.com": ROOT}),
            controller_settings(**{key.replace("-", "_"): text for key, text in data.items()}),
        )


_TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="\";{}#$\\'\n\r /:.*abc0159~^()|=<>", max_size=40),
    st.sampled_from(HOSTILE).flatmap(lambda value: st.text(max_size=8).map(lambda text: text + value)),
    st.from_regex(r"\A(https?://)?[a-z$.]{1,8}(/[a-z$;{}\"\\]{0,6}){0,3}\Z"),
)


def check_random(names: list[str], text: str, path: str, kind: str) -> None:
    """One random Ingress: denied, or rendered as nothing but what the generator writes."""
    annotations = dict.fromkeys(names, text)
    one = ingress("x", {"a.com": [(path, kind, "a"), ("/", "Prefix", "b")]}, annotations)
    reason = denied(one, service("b"), slices("b", "10.0.1.1"))
    assert_inert(one)
    if not reason:
        _, problems = parse_annotations(one["metadata"]["annotations"])
        assert not problems


_RANDOM = given(
    st.lists(st.sampled_from(VALUED), min_size=1, max_size=4), _TEXTS, _TEXTS.map(lambda text: f"/{text}"),
    st.sampled_from(["Prefix", "Exact", "ImplementationSpecific"]),
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@_RANDOM
def test_random_values_are_refused_or_inert(names: list[str], text: str, path: str, kind: str) -> None:
    """Random annotation values and paths never change a directive."""
    check_random(names, text, path, kind)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=5000, suppress_health_check=list(HealthCheck))
@_RANDOM
def test_five_thousand_random_values(names: list[str], text: str, path: str, kind: str) -> None:
    """The long form."""
    check_random(names, text, path, kind)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('a "b c" d;', ("a", "b c", "d")),
        (r'a "b\"c\\d\.e";', ("a", r'b"c\d\.e')),
        ("a 'b;{}' ${x}y;", ("a", "b;{}", "${x}y")),
        ("a # no\n b;", ("a", "b")),
    ],
)
def test_our_reader_reads_words_as_nginx_does(text: str, words: tuple[str, ...]) -> None:
    """Quotes, escapes, variables' braces and comments."""
    assert parse(text)[0].words == words


@pytest.mark.parametrize("text", ["a", "a {", "}", ";", 'a "b;', 'a "b"c;'])
def test_our_reader_refuses_what_does_not_end(text: str) -> None:
    """Each with the line."""
    with pytest.raises(SyntaxProblem, match="line 1"):
        parse(text)


def test_the_skeleton_of_harmless_ingresses_is_stable() -> None:
    """A changed value changes no directive: only its own words."""
    one, other = (
        conf(*WEB, ingress("x", {"a.com": ROOT}, {"limit-rps": value, "auth-realm": realm, "auth-type": "basic", "auth-secret": "s"}),
             secret("s", {"auth": b"ann:x\n"}))
        for value, realm in (("5", "a"), ("6", "b; no {directive}"[:1]))
    )  # fmt: skip
    assert skeleton(parse(one)) == skeleton(parse(other))
