"""Temporary: until the whole surface is there."""
from __future__ import annotations
from dataclasses import dataclass
from functools import partial
from typing import Any
from pdserve.balancer.aggregate import ControlPlane
from pdserve.balancer.auth import Access
from pdserve.balancer.request import Route

@dataclass(frozen=True, slots=True)
class Endpoint:
    handle: Any
    access: Access

class Surface:
    def __init__(self, table: Any) -> None: self._table = table
    def find(self, path: str) -> Any: return self._table.get(path)

def build_surface(fleet: Any, pool: Any, dispatcher: Any, config: Any) -> Surface:
    control = ControlPlane(fleet, pool, dispatcher)
    async def prompt(route, client, body): await dispatcher.dispatch(route, body, client)
    g = {"/health": control.readiness, "/readiness": control.readiness, "/liveness": control.liveness, "/v1/models": control.any_worker,
     "/model_info": control.any_worker, "/get_model_info": control.any_worker, "/server_info": control.server_info, "/get_server_info": control.server_info,
     "/workers": control.workers, "/pdserve/state": control.state}
    t = {p: {"GET": Endpoint(e, Access.PUBLIC)} for p, e in g.items()}
    e = Endpoint(control.flush_cache, Access.ADMIN)
    t["/flush_cache"] = {"GET": e, "POST": e}
    t["/abort_request"] = {"POST": Endpoint(control.abort_request, Access.ADMIN)}
    for r in Route: t[str(r)] = {"POST": Endpoint(partial(prompt, r), Access.CLIENT)}
    t["/generate"]["PUT"] = t["/generate"]["POST"]
    return Surface(t)
