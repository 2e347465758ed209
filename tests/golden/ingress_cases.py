"""The objects behind the golden configurations: one case for each part of what an Ingress can ask for."""

# ruff: noqa: E501  # objects as short calls

from __future__ import annotations

from ingress_objects import Object, config_map, ingress, secret, service, settings, slices

A = [service("a"), slices("a", "10.0.0.1", "10.0.0.2")]
B = [service("b"), slices("b", "10.0.1.1")]
ROOT = [("/", "Prefix", "a")]

CASES: dict[str, list[Object]] = {
    "tutorial": [
        ingress("nginx-ingress", {"www.itopenlab.com": [("/", "Prefix", "svc-lb")]}),
        service("svc-lb", type="LoadBalancer"),
        slices("svc-lb", "100.115.147.71", "100.115.147.72", "100.105.212.130", port=80),
    ],
    "paths": [
        *A, *B, service("empty"),
        ingress("paths", {"a.com": [
            ("/foo", "Prefix", "a"), ("/foo", "Exact", "b"), ("/aaa/bbb/", "Prefix", "b"), ("/aaa", "Prefix", "a"),
            ("/plain", "ImplementationSpecific", "a"), ("/empty", "Prefix", "empty"), ("/gone", "Exact", "gone"),
        ], "*.b.com": ROOT}),
        ingress("default", defaultBackend={"service": {"name": "a", "port": {"name": "http"}}}),
        ingress("regex", {"r.com": [("/x(/|$)(.*)", "ImplementationSpecific", "a")]},
                {"use-regex": "true", "rewrite-target": "/$2", "x-forwarded-prefix": "/x"}),
    ],
    "balancing": [
        *A, *B,
        ingress("sticky", {"sticky.com": ROOT}, {"affinity": "cookie", "session-cookie-name": "route", "session-cookie-max-age": "60"}),
        ingress("hash", {"hash.com": ROOT}, {"upstream-hash-by": "$request_uri"}),
        ingress("ewma", {"ewma.com": ROOT}, {"load-balance": "ewma"}),
        ingress("vip", {"vip.com": ROOT}, {"service-upstream": "true"}),
        ingress("main", {"canary.com": ROOT}),
        ingress("canary", {"canary.com": [("/", "Prefix", "b")]},
                {"canary": "true", "canary-by-header": "X-Canary", "canary-by-cookie": "canary", "canary-weight": "30"}),
    ],
    "guards": [
        *A, *B,
        secret("users", {"auth": b"ann:$apr1$x$y\n"}),
        ingress("basic", {"basic.com": ROOT}, {"auth-type": "basic", "auth-secret": "users", "auth-realm": "who are you"}),
        ingress("outside", {"auth.com": ROOT}, {
            "auth-url": "http://auth.dev.svc.cluster.local/check", "auth-signin": "https://login.com/start",
            "auth-response-headers": "X-User", "satisfy": "any", "allowlist-source-range": "10.0.0.0/8"}),
        ingress("limits", {"limits.com": ROOT}, {"limit-rps": "5", "limit-connections": "3", "limit-allowlist": "10.1.0.0/16",
                                                 "denylist-source-range": "192.0.2.0/24"}),
        ingress("no-users", {"closed.com": ROOT}, {"auth-type": "basic", "auth-secret": "missing"}),
    ],
    "answers": [
        *A, *B,
        config_map("headers", {"X-Extra": "yes"}),
        settings(global_allowed_response_headers="X-Extra", use_forwarded_headers="true", hsts="false"),
        ingress("cors", {"cors.com": ROOT}, {"enable-cors": "true", "cors-allow-origin": "https://*.example.com"}),
        ingress("errors", {"errors.com": ROOT}, {"custom-http-errors": "404,503", "default-backend": "b"}),
        ingress("headers", {"headers.com": ROOT}, {"custom-headers": "headers", "upstream-vhost": "other.com"}),
        ingress("moved", {"moved.com": ROOT}, {"permanent-redirect": "https://new.com$request_uri", "permanent-redirect-code": "308"}),
        ingress("www", {"site.com": ROOT}, {"from-to-www-redirect": "true", "server-alias": "alias.com", "app-root": "/app"}),
        ingress("mirror", {"mirror.com": ROOT}, {"mirror-target": "http://mirror.dev.svc$request_uri"}),
        ingress("grpc", {"grpc.com": ROOT}, {"backend-protocol": "GRPC", "proxy-read-timeout": "600"}),
        ingress("big", {"big.com": ROOT}, {"proxy-body-size": "8m", "proxy-buffering": "on", "proxy-buffers-number": "2"}),
        ingress("far", {"far.com": [("/", "Prefix", "outside")]}, {"force-ssl-redirect": "true"}),
        service("outside", type="ExternalName", externalName="www.example.com", ports=[{"name": "http", "port": 80}]),
    ],
}  # fmt: skip
