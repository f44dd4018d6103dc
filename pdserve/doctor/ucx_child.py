"""Asks the UCX that NIXL brings along what it can use here, and prints it as JSON; runs as its own process.

``ucx_info -d`` without ``ucx_info``, which the wheels do not ship: UCT's public C
interface (uct/api/uct.h of UCX 1.23) lists components, their memory
domains, and each domain's transports and devices. A driver may hang or crash
here, so the doctor starts this module and waits with a limit.

    python -m pdserve.doctor.ucx_child FOLDER     # FOLDER: nixl_cu13.libs of the wheel
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

from pdserve.process.parent_death import die_with_parent

UCT_COMPONENT_NAME_MAX = 16
UCT_TL_NAME_MAX = 10
UCT_MD_NAME_MAX = 16
UCT_DEVICE_NAME_MAX = 32
FIELD_NAME, FIELD_MD_RESOURCE_COUNT, FIELD_MD_RESOURCES = 1, 2, 4


class _MdResource(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * UCT_MD_NAME_MAX),)


class _ComponentAttr(ctypes.Structure):
    """``uct_component_attr_t``; the spare words are for fields that a newer UCX may add."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * UCT_COMPONENT_NAME_MAX),
        ("md_resource_count", ctypes.c_uint),
        ("md_resources", ctypes.POINTER(_MdResource)),
        ("flags", ctypes.c_uint64),
        ("spare", ctypes.c_uint64 * 16),
    )


class _Resource(ctypes.Structure):
    """``uct_tl_resource_desc_t``."""

    _fields_ = (
        ("tl_name", ctypes.c_char * UCT_TL_NAME_MAX),
        ("dev_name", ctypes.c_char * UCT_DEVICE_NAME_MAX),
        ("dev_type", ctypes.c_int),
        ("sys_device", ctypes.c_uint8),
    )


def list_resources(folder: Path) -> dict[str, Any]:
    """``{"version": ..., "resources": [[transport, device], ...]}`` of the UCX in ``folder``.

    Raises:
        OSError: if its libraries cannot be loaded.
        RuntimeError: if a call fails that cannot.
    """
    paths = {name: next(folder.glob(f"lib{name}-*.so*"), None) for name in ("ucs", "ucm", "uct", "ucp")}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise OSError(f"no lib{missing[0]} in {folder}")
    libraries = {
        name: ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for name, path in paths.items() if path
    }
    uct, ucp = libraries["uct"], libraries["ucp"]
    ucp.ucp_get_version_string.restype = ctypes.c_char_p
    found = [pair for component in _components(uct) for pair in _of_component(uct, component)]
    return {"version": ucp.ucp_get_version_string().decode(), "resources": sorted(set(found))}


def _components(uct: Any) -> list[ctypes.c_void_p]:
    components, count = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_uint()
    if uct.uct_query_components(ctypes.byref(components), ctypes.byref(count)):
        raise RuntimeError("uct_query_components failed")
    return [ctypes.c_void_p(components[i]) for i in range(count.value)]


def _of_component(uct: Any, component: ctypes.c_void_p) -> list[tuple[str, str]]:
    attr = _ComponentAttr(field_mask=FIELD_NAME | FIELD_MD_RESOURCE_COUNT)
    if uct.uct_component_query(component, ctypes.byref(attr)) or not attr.md_resource_count:
        return []
    domains = (_MdResource * attr.md_resource_count)()
    attr.field_mask, attr.md_resources = FIELD_MD_RESOURCES, domains
    if uct.uct_component_query(component, ctypes.byref(attr)):
        return []
    config = ctypes.c_void_p()
    if uct.uct_md_config_read(component, None, None, ctypes.byref(config)):
        return []
    found = [pair for domain in domains for pair in _of_domain(uct, component, domain.name, config)]
    uct.uct_config_release(config)
    return found


def _of_domain(
    uct: Any, component: ctypes.c_void_p, name: bytes, config: ctypes.c_void_p
) -> list[tuple[str, str]]:
    domain, rows, count = ctypes.c_void_p(), ctypes.POINTER(_Resource)(), ctypes.c_uint()
    if uct.uct_md_open(component, name, config, ctypes.byref(domain)):
        return []
    if uct.uct_md_query_tl_resources(domain, ctypes.byref(rows), ctypes.byref(count)):
        return []
    return [(rows[i].tl_name.decode(), rows[i].dev_name.decode()) for i in range(count.value)]


if __name__ == "__main__":
    die_with_parent(os.getppid())
    sys.stdout.write(json.dumps(list_resources(Path(sys.argv[1]))) + "\n")
