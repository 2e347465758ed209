"""Pods and pod templates: defaults, and the rules that need no cluster to check.

Source: kubernetes pkg/apis/core/v1/defaults.go, pkg/apis/core/validation/validation.go ValidatePodSpec (v1.30).
"""

from __future__ import annotations

import re
from typing import Any

from testbed.manifests.kinds.causes import Causes
from testbed.manifests.kinds.names import (
    address_problems,
    config_key_problems,
    dns1123_label_problems,
    dns1123_subdomain_problems,
    env_name_problems,
    label_value_problems,
    port_name_problems,
    port_number_problems,
    qualified_name_problems,
)
from testbed.manifests.kinds.schema import QUANTITY
from testbed.manifests.kinds.service import PROTOCOLS, validate_port_reference
from testbed.model.objects import Object

RESTART_POLICIES = ("Always", "Never", "OnFailure")
MAX_SEARCHES = 32  # these two are glibc's limits, which validation.go enforces
MAX_SEARCH_CHARACTERS = 2048
DNS_POLICIES = ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None")
PULL_POLICIES = ("Always", "IfNotPresent", "Never")
TAINT_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_SCHEMES = ("HTTP", "HTTPS")
_MESSAGE_POLICIES = ("FallbackToLogsOnError", "File")
#: The volume types of 1.30. A type we do not provide is still valid; the kubelet says that it cannot mount it.
VOLUME_TYPES = (
    "awsElasticBlockStore", "azureDisk", "azureFile", "cephfs", "cinder", "configMap", "csi", "downwardAPI", "emptyDir",
    "ephemeral", "fc", "flexVolume", "flocker", "gcePersistentDisk", "gitRepo", "glusterfs", "hostPath", "iscsi", "nfs",
    "persistentVolumeClaim", "photonPersistentDisk", "portworxVolume", "projected", "quobyte", "rbd", "scaleIO", "secret",
    "storageos", "vsphereVolume",
)  # fmt: skip
_HOST_PATH_TYPES = (
    "", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket",
)  # fmt: skip
_FIELD_PATHS = (
    "metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName", "spec.serviceAccountName",
    "status.hostIP", "status.hostIPs", "status.podIP", "status.podIPs",
)  # fmt: skip
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_HANDLERS = ("exec", "httpGet", "tcpSocket", "grpc")
DEFAULT_GRACE_S = 30
_NOT_READY_TOLERATION_S = 300

_BAD_HEADER = (
    "a valid HTTP header must consist of alphanumeric characters or '-' (e.g. 'X-Header-Name', regex used for validation is "
    "'[-A-Za-z0-9]+')"
)
_ACTIONS = ("exec", "httpGet", "tcpSocket", "sleep")


def default_pod_spec(spec: Object) -> None:
    """Fill in the defaults of a pod's spec, or of a template's."""
    spec["restartPolicy"] = spec.get("restartPolicy") or "Always"
    spec["dnsPolicy"] = spec.get("dnsPolicy") or "ClusterFirst"
    spec["schedulerName"] = spec.get("schedulerName") or "default-scheduler"
    spec.setdefault("terminationGracePeriodSeconds", DEFAULT_GRACE_S)
    spec.setdefault("securityContext", {})
    if not spec.get("serviceAccountName") and spec.get("serviceAccount"):
        spec["serviceAccountName"] = spec["serviceAccount"]
    if spec.get("serviceAccountName"):
        spec["serviceAccount"] = spec["serviceAccountName"]
    for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
        _default_container(container, host_network=bool(spec.get("hostNetwork")))
    for volume in spec.get("volumes") or []:
        _default_volume(volume)


def _default_container(container: Object, *, host_network: bool) -> None:
    image = container.get("image", "")
    if not container.get("imagePullPolicy"):
        tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
        container["imagePullPolicy"] = "Always" if tag in ("", "latest") and "@" not in image else "IfNotPresent"
    container["terminationMessagePath"] = container.get("terminationMessagePath") or "/dev/termination-log"
    container["terminationMessagePolicy"] = container.get("terminationMessagePolicy") or "File"
    container.setdefault("resources", {})
    for port in container.get("ports") or []:
        port["protocol"] = port.get("protocol") or "TCP"
        if host_network and not port.get("hostPort"):
            port["hostPort"] = port.get("containerPort", 0)
    for name in _PROBES:
        if name in container:
            _default_probe(container[name])
    for hook in (container.get("lifecycle") or {}).values():
        _default_http_get(hook.get("httpGet"))
    for variable in container.get("env") or []:
        field_ref = (variable.get("valueFrom") or {}).get("fieldRef")
        if field_ref is not None:
            field_ref.setdefault("apiVersion", "v1")


def _default_probe(probe: Object) -> None:
    defaults = (("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3))
    for field, default in defaults:
        probe[field] = probe.get(field) or default
    _default_http_get(probe.get("httpGet"))


def _default_http_get(action: Object | None) -> None:
    if action is not None:
        action["path"] = action.get("path") or "/"
        action["scheme"] = action.get("scheme") or "HTTP"


def _default_volume(volume: Object) -> None:
    if not any(kind in volume for kind in VOLUME_TYPES):
        volume["emptyDir"] = {}
    for kind in ("configMap", "secret", "downwardAPI", "projected"):
        if kind in volume:
            volume[kind].setdefault("defaultMode", 0o644)
    if "hostPath" in volume:
        volume["hostPath"].setdefault("type", "")


def default_pod(pod: Object) -> None:
    """Fill in the defaults of a pod itself, with what admission adds: the service account and two tolerations."""
    spec = pod.setdefault("spec", {})
    default_pod_spec(spec)
    spec.setdefault("enableServiceLinks", True)
    if not spec.get("serviceAccountName"):
        spec["serviceAccountName"] = spec["serviceAccount"] = "default"
    for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
        limits = (container.get("resources") or {}).get("limits")
        if limits:
            container["resources"]["requests"] = {**limits, **(container["resources"].get("requests") or {})}
    tolerations = spec.get("tolerations") or []
    for condition in ("not-ready", "unreachable"):  # plugin DefaultTolerationSeconds
        key = f"node.kubernetes.io/{condition}"
        if not any(_tolerates_eviction(toleration, key) for toleration in tolerations):
            tolerations = [
                *tolerations,
                {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": _NOT_READY_TOLERATION_S},
            ]
    spec["tolerations"] = tolerations
    pod.setdefault("status", {}).setdefault("qosClass", qos_class(spec))


def _tolerates_eviction(toleration: Object, key: str) -> bool:
    return toleration.get("key", "") in (key, "") and toleration.get("effect", "") in ("NoExecute", "")


def qos_class(spec: Object) -> str:
    """Return Guaranteed, Burstable or BestEffort, by the cpu and memory of the containers."""
    containers = [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]
    resources = [container.get("resources") or {} for container in containers]
    if not any(
        kind in (each.get(part) or {})
        for each in resources
        for part in ("limits", "requests")
        for kind in ("cpu", "memory")
    ):
        return "BestEffort"
    guaranteed = all(
        kind in (each.get("limits") or {})
        and (each.get("requests") or {}).get(kind, each["limits"][kind]) == each["limits"][kind]
        for each in resources
        for kind in ("cpu", "memory")
    )
    return "Guaranteed" if guaranteed else "Burstable"


# --- validation ------------------------------------------------------------------------------------------------------


def validate_pod_spec(spec: Object, path: str, causes: Causes) -> None:
    """Check a defaulted pod spec, a pod's or a template's."""
    volumes = _validate_volumes(spec.get("volumes") or [], f"{path}.volumes", causes)
    names: set[str] = set()
    if not spec.get("containers"):
        causes.required(f"{path}.containers")
    host_ports: set[tuple[Any, ...]] = set()
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(kind) or []):
            where = f"{path}.{kind}[{index}]"
            name = container.get("name", "")
            if not name:
                causes.required(f"{where}.name")
            else:
                causes.invalid_each(f"{where}.name", name, dns1123_label_problems(name))
                if name in names:
                    causes.duplicate(f"{where}.name", name)
                names.add(name)
            _validate_container(container, where, volumes, host_ports, causes, is_init=kind == "initContainers")
    causes.one_of(f"{path}.restartPolicy", spec.get("restartPolicy"), RESTART_POLICIES)
    causes.one_of(f"{path}.dnsPolicy", spec.get("dnsPolicy"), DNS_POLICIES)
    grace = spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE_S)
    if grace < 0:
        causes.invalid(f"{path}.terminationGracePeriodSeconds", grace, "must be greater than or equal to 0")
    deadline = spec.get("activeDeadlineSeconds", 1)
    if deadline < 1:
        causes.invalid(f"{path}.activeDeadlineSeconds", deadline, "must be between 1 and 2147483647, inclusive")
    for field in ("hostname", "subdomain"):
        if spec.get(field):
            causes.invalid_each(f"{path}.{field}", spec[field], dns1123_label_problems(spec[field]))
    for field in ("nodeName", "serviceAccountName"):
        if spec.get(field):
            causes.invalid_each(f"{path}.{field}", spec[field], dns1123_subdomain_problems(spec[field]))
    for key, value in sorted((spec.get("nodeSelector") or {}).items()):
        causes.invalid_each(f"{path}.nodeSelector", key, qualified_name_problems(key))
        causes.invalid_each(f"{path}.nodeSelector", value, label_value_problems(value))
    for index, toleration in enumerate(spec.get("tolerations") or []):
        _validate_toleration(toleration, f"{path}.tolerations[{index}]", causes)
    for index, alias in enumerate(spec.get("hostAliases") or []):
        where = f"{path}.hostAliases[{index}]"
        causes.invalid_each(f"{where}.ip", alias.get("ip", ""), address_problems(alias.get("ip", "")))
        for hostname in alias.get("hostnames") or []:
            causes.invalid_each(f"{where}.hostnames", hostname, dns1123_subdomain_problems(hostname))
    _validate_dns(spec, path, causes)


def _validate_dns(spec: Object, path: str, causes: Causes) -> None:
    config = spec.get("dnsConfig") or {}
    servers = config.get("nameservers") or []
    if spec.get("dnsPolicy") == "None" and not servers:
        causes.required(
            f"{path}.dnsConfig.nameservers", "must provide at least one DNS nameserver when `dnsPolicy` is None"
        )
    if len(servers) > 3:
        causes.invalid(f"{path}.dnsConfig.nameservers", servers, "must not have more than 3 nameservers")
    for index, server in enumerate(servers):
        causes.invalid_each(f"{path}.dnsConfig.nameservers[{index}]", server, address_problems(server))
    searches = config.get("searches") or []
    if len(searches) > MAX_SEARCHES:
        causes.invalid(f"{path}.dnsConfig.searches", searches, f"must not have more than {MAX_SEARCHES} search paths")
    if len(" ".join(searches)) > MAX_SEARCH_CHARACTERS:
        causes.invalid(
            f"{path}.dnsConfig.searches",
            searches,
            f"must not have more than {MAX_SEARCH_CHARACTERS} characters (including spaces) in the search list",
        )
    for index, search in enumerate(searches):
        name = search.removesuffix(".")
        causes.invalid_each(
            f"{path}.dnsConfig.searches[{index}]", search, dns1123_subdomain_problems(name) if name else []
        )
    for index, option in enumerate(config.get("options") or []):
        where = f"{path}.dnsConfig.options[{index}]"
        if not option.get("name"):
            causes.required(f"{where}.name", "must not be empty")
        # These become words of a line in resolv.conf; upstream trusts them.
        for field in ("name", "value"):
            if not re.fullmatch(r"[-\w.:]*", option.get(field, ""), re.ASCII):
                causes.invalid(f"{where}.{field}", option[field], "must be one word of resolv.conf")


def _validate_toleration(toleration: Object, where: str, causes: Causes) -> None:
    key, operator = toleration.get("key", ""), toleration.get("operator", "") or "Equal"
    if key:
        causes.invalid_each(f"{where}.key", key, qualified_name_problems(key))
    elif operator != "Exists":
        causes.invalid(
            f"{where}.operator",
            operator,
            'operator must be Exists when `key` is empty, which means "match all values and all keys"',
        )
    if operator == "Equal":
        causes.invalid_each(
            f"{where}.operator", toleration.get("value", ""), label_value_problems(toleration.get("value", ""))
        )
    elif operator == "Exists":
        if toleration.get("value"):
            causes.invalid(f"{where}.operator", operator, "value must be empty when `operator` is 'Exists'")
    else:
        causes.unsupported(f"{where}.operator", operator, ("Equal", "Exists"))
    effect = toleration.get("effect", "")
    if "tolerationSeconds" in toleration and effect != "NoExecute":
        causes.invalid(f"{where}.effect", effect, "effect must be 'NoExecute' when `tolerationSeconds` is set")
    if effect and effect not in TAINT_EFFECTS:
        causes.unsupported(f"{where}.effect", effect, TAINT_EFFECTS)


def _validate_volumes(volumes: list[Object], path: str, causes: Causes) -> set[str]:
    names: set[str] = set()
    for index, volume in enumerate(volumes):
        where = f"{path}[{index}]"
        name = volume.get("name", "")
        if not name:
            causes.required(f"{where}.name")
        else:
            causes.invalid_each(f"{where}.name", name, dns1123_label_problems(name))
            if name in names:
                causes.duplicate(f"{where}.name", name)
            names.add(name)
        given = [kind for kind in VOLUME_TYPES if kind in volume]
        if not given:
            causes.required(where, "must specify a volume type")
        for extra in given[1:]:
            causes.forbidden(f"{where}.{extra}", "may not specify more than 1 volume type")
        for kind in given[:1]:
            _validate_volume(kind, volume[kind], f"{where}.{kind}", causes)
    return names


def _validate_volume(kind: str, source: Object, where: str, causes: Causes) -> None:
    match kind:
        case "configMap":
            if not source.get("name"):
                causes.required(f"{where}.name")
            _validate_items(source, where, causes)
        case "secret":
            if not source.get("secretName"):
                causes.required(f"{where}.secretName")
            _validate_items(source, where, causes)
        case "hostPath":
            if not source.get("path"):
                causes.required(f"{where}.path")
            elif ".." in source["path"].split("/"):
                causes.invalid(f"{where}.path", source["path"], "must not contain '..'")
            if source.get("type", "") not in _HOST_PATH_TYPES:
                causes.unsupported(f"{where}.type", source["type"], _HOST_PATH_TYPES)
        case "persistentVolumeClaim":
            if not source.get("claimName"):
                causes.required(f"{where}.claimName")
        case "projected":
            for index, part in enumerate(source.get("sources") or []):
                for inner in ("configMap", "secret", "downwardAPI"):
                    if inner in part:
                        _validate_items(part[inner], f"{where}.sources[{index}].{inner}", causes)
            _validate_mode(source, "defaultMode", where, causes)
        case "downwardAPI":
            _validate_items(source, where, causes)
        case _:
            pass


def _validate_items(source: Object, where: str, causes: Causes) -> None:
    _validate_mode(source, "defaultMode", where, causes)
    for index, item in enumerate(source.get("items") or []):
        here = f"{where}.items[{index}]"
        if "fieldRef" not in item and "resourceFieldRef" not in item:  # those belong to the downward API
            if not item.get("key"):
                causes.required(f"{here}.key")
            else:
                causes.invalid_each(f"{here}.key", item["key"], config_key_problems(item["key"]))
        if not item.get("path"):
            causes.required(f"{here}.path")
        else:
            validate_local_path(item["path"], f"{here}.path", causes)
        _validate_mode(item, "mode", here, causes)


def _validate_mode(source: Object, field: str, where: str, causes: Causes) -> None:
    if not 0 <= source.get(field, 0) <= 0o777:
        causes.invalid(f"{where}.{field}", source[field], "must be a number between 0 and 0777 (octal), both inclusive")


def validate_local_path(path: str, where: str, causes: Causes) -> None:
    """Check a path that must stay below its directory. Source: validateLocalNonReservedPath."""
    if path.startswith("/"):
        causes.invalid(where, path, "must be a relative path")
    if ".." in path.split("/"):
        causes.invalid(where, path, "must not contain '..'")
    if path.startswith("..") and path.split("/")[0] != "..":
        causes.invalid(where, path, "must not start with '..'")
    if not path.isprintable():
        causes.invalid(where, path, "must not contain control characters")


def _validate_container(
    container: Object, where: str, volumes: set[str], host_ports: set[tuple[Any, ...]], causes: Causes, *, is_init: bool
) -> None:
    image = container.get("image", "")
    if not image:
        causes.required(f"{where}.image")
    elif image != image.strip() or not image.isprintable():
        causes.invalid(f"{where}.image", image, "must not have leading or trailing whitespace")
    causes.one_of(f"{where}.imagePullPolicy", container.get("imagePullPolicy"), PULL_POLICIES)
    causes.one_of(f"{where}.terminationMessagePolicy", container.get("terminationMessagePolicy"), _MESSAGE_POLICIES)
    restart_policy = container.get("restartPolicy")
    if restart_policy is not None:
        if not is_init:
            causes.forbidden(f"{where}.restartPolicy", "may not be set for non-init containers")
        elif restart_policy != "Always":
            causes.unsupported(f"{where}.restartPolicy", restart_policy, ("Always",))
    _validate_container_ports(container.get("ports") or [], f"{where}.ports", host_ports, causes)
    _validate_env(container, where, causes)
    mount_paths: set[str] = set()
    for index, mount in enumerate(container.get("volumeMounts") or []):
        _validate_mount(mount, f"{where}.volumeMounts[{index}]", volumes, mount_paths, causes)
    for name in _PROBES:
        if name in container and is_init and restart_policy != "Always":
            causes.forbidden(f"{where}.{name}", "may not be set for init containers without restartPolicy=Always")
        elif name in container:
            _validate_probe(container[name], f"{where}.{name}", causes, once=name != "readinessProbe")
    for hook, action in sorted((container.get("lifecycle") or {}).items()):
        _validate_handler(action, f"{where}.lifecycle.{hook}", _ACTIONS, causes)
    for part in ("limits", "requests"):
        for key, quantity in sorted(((container.get("resources") or {}).get(part) or {}).items()):
            causes.invalid_each(f"{where}.resources.{part}", key, qualified_name_problems(key))
            if str(quantity).startswith("-") or not QUANTITY.fullmatch(str(quantity)):
                causes.invalid(f"{where}.resources.{part}[{key}]", str(quantity), "must be greater than or equal to 0")
    working_dir = container.get("workingDir", "")
    if not working_dir.isprintable():
        causes.invalid(f"{where}.workingDir", working_dir, "must not contain control characters")


def _validate_container_ports(ports: list[Object], path: str, host_ports: set[tuple[Any, ...]], causes: Causes) -> None:
    names: set[str] = set()
    for index, port in enumerate(ports):
        where = f"{path}[{index}]"
        name = port.get("name", "")
        if name:
            causes.invalid_each(f"{where}.name", name, port_name_problems(name))
            if name in names:
                causes.duplicate(f"{where}.name", name)
            names.add(name)
        number = port.get("containerPort", 0)
        if number == 0:
            causes.required(f"{where}.containerPort")
        else:
            causes.invalid_each(f"{where}.containerPort", number, port_number_problems(number))
        host_port = port.get("hostPort", 0)
        if host_port:
            causes.invalid_each(f"{where}.hostPort", host_port, port_number_problems(host_port))
            taken = (port.get("protocol"), port.get("hostIP", ""), host_port)
            if taken in host_ports:
                causes.duplicate(f"{where}.hostPort", f"{taken[0]}/{taken[1]}/{taken[2]}")
            host_ports.add(taken)
        if port.get("hostIP"):
            causes.invalid_each(f"{where}.hostIP", port["hostIP"], address_problems(port["hostIP"]))
        causes.one_of(f"{where}.protocol", port.get("protocol"), PROTOCOLS)


def _validate_env(container: Object, where: str, causes: Causes) -> None:
    for index, variable in enumerate(container.get("env") or []):
        here = f"{where}.env[{index}]"
        name = variable.get("name", "")
        if not name:
            causes.required(f"{here}.name")
        else:
            causes.invalid_each(f"{here}.name", name, env_name_problems(name))
        if "\0" in variable.get("value", ""):
            causes.invalid(f"{here}.value", variable["value"], "must not contain a null character")
        if "valueFrom" in variable:
            _validate_value_from(variable, f"{here}.valueFrom", causes)
    for index, source in enumerate(container.get("envFrom") or []):
        here = f"{where}.envFrom[{index}]"
        prefix = source.get("prefix", "")
        if prefix:
            causes.invalid_each(f"{here}.prefix", prefix, env_name_problems(prefix))
        given = [kind for kind in ("configMapRef", "secretRef") if kind in source]
        if not given:
            causes.invalid(here, "", "must specify one of: `configMapRef` or `secretRef`")
        elif len(given) > 1:
            causes.invalid(here, "", "may not have more than one field specified at a time")
        for kind in given:
            if not source[kind].get("name"):
                causes.required(f"{here}.{kind}.name")
    for field in ("command", "args"):
        for index, word in enumerate(container.get(field) or []):
            if "\0" in word:
                causes.invalid(f"{where}.{field}[{index}]", word, "must not contain a null character")


def _validate_value_from(variable: Object, where: str, causes: Causes) -> None:
    source = variable["valueFrom"]
    kinds = ("fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef")
    given = [kind for kind in kinds if kind in source]
    if not given:
        causes.invalid(
            where, "", f"must specify one of: {', '.join(f'`{kind}`' for kind in kinds[:-1])} or `{kinds[-1]}`"
        )
    elif variable.get("value"):
        causes.invalid(where, "", "may not be specified when `value` is not empty")
    elif len(given) > 1:
        causes.invalid(where, "", "may not have more than one field specified at a time")
    field_path = (source.get("fieldRef") or {}).get("fieldPath", "")
    if "fieldRef" in source:
        if not field_path:
            causes.required(f"{where}.fieldRef.fieldPath")
        elif not _SUBSCRIPT.fullmatch(field_path) and field_path not in _FIELD_PATHS:
            causes.unsupported(f"{where}.fieldRef.fieldPath", field_path, _FIELD_PATHS)
    for kind in ("configMapKeyRef", "secretKeyRef"):
        if kind in source:
            if not source[kind].get("name"):
                causes.required(f"{where}.{kind}.name")
            key = source[kind].get("key", "")
            if not key:
                causes.required(f"{where}.{kind}.key")
            else:
                causes.invalid_each(f"{where}.{kind}.key", key, config_key_problems(key))


def _validate_mount(mount: Object, where: str, volumes: set[str], mount_paths: set[str], causes: Causes) -> None:
    name = mount.get("name", "")
    if not name:
        causes.required(f"{where}.name")
    elif name not in volumes:
        causes.not_found(f"{where}.name", name)
    path = mount.get("mountPath", "")
    if not path:
        causes.required(f"{where}.mountPath")
    else:
        if path in mount_paths:
            causes.invalid(f"{where}.mountPath", path, "must be unique")
        mount_paths.add(path)
        # Upstream lets the runtime refuse the rest; here it is refused before anything is mounted.
        if not path.startswith("/"):
            causes.invalid(f"{where}.mountPath", path, "must be an absolute path")
        if ":" in path:
            causes.invalid(f"{where}.mountPath", path, "must not contain ':'")
        if ".." in path.split("/") or not path.isprintable():
            causes.invalid(f"{where}.mountPath", path, "must not contain '..' or control characters")
    if mount.get("subPath") and mount.get("subPathExpr"):
        causes.invalid(f"{where}.subPathExpr", mount["subPathExpr"], "subPathExpr and subPath are mutually exclusive")
    for field in ("subPath", "subPathExpr"):
        if mount.get(field):
            validate_local_path(mount[field], f"{where}.{field}", causes)


def _validate_probe(probe: Object, where: str, causes: Causes, *, once: bool) -> None:
    _validate_handler(probe, where, _HANDLERS, causes)
    for field in ("initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"):
        if probe.get(field, 0) < 0:
            causes.invalid(f"{where}.{field}", probe[field], "must be greater than or equal to 0")
    if once and probe.get("successThreshold", 1) != 1:
        causes.invalid(f"{where}.successThreshold", probe["successThreshold"], "must be 1")
    if probe.get("terminationGracePeriodSeconds", 1) < 1:
        causes.invalid(
            f"{where}.terminationGracePeriodSeconds", probe["terminationGracePeriodSeconds"], "must be greater than 0"
        )


def _validate_handler(handler: Object, where: str, kinds: tuple[str, ...], causes: Causes) -> None:
    given = [kind for kind in kinds if kind in handler]
    if not given:
        causes.required(where, "must specify a handler type")
    for extra in given[1:]:
        causes.forbidden(f"{where}.{extra}", "may not specify more than 1 handler type")
    for kind in given[:1]:
        action, here = handler[kind], f"{where}.{kind}"
        if kind == "exec" and not action.get("command"):
            causes.required(f"{here}.command")
        if kind in ("httpGet", "tcpSocket", "grpc"):
            validate_port_reference(action.get("port", 0), f"{here}.port", causes)
        if kind == "httpGet":
            causes.one_of(f"{here}.scheme", action.get("scheme"), _SCHEMES)
            if not re.fullmatch(r"[!-~]*", action.get("path", "")):
                causes.invalid(f"{here}.path", action["path"], "must be a URL path")
            for index, header in enumerate(action.get("httpHeaders") or []):
                if not re.fullmatch(r"[-A-Za-z0-9]+", header.get("name", "")):
                    causes.invalid(f"{here}.httpHeaders", header.get("name", ""), _BAD_HEADER)
                if "\r" in header.get("value", "") or "\n" in header.get("value", ""):
                    causes.invalid(f"{here}.httpHeaders[{index}].value", header["value"], "must be one line")
