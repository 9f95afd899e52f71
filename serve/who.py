"""Dependencies of routes: whose request it is, and whether it may change or see all."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Depends, Request

from embedft.errors import NotAuthorized
from serve.errors import AdminRequired
from serve.gateway import Gateway


def known(gateway: Gateway) -> Callable[[Request], Coroutine[Any, Any, None]]:
    """Puts the tenant into `request.state.tenant`. NotAuthorized."""

    async def known_tenant(request: Request) -> None:
        tenant = request.state.tenant = gateway.tenants.identify(request.headers.get("authorization", ""))
        request.state.record.tell(tenant=tenant.name)  # that of a request that is refused, too

    return known_tenant


def admin_only(gateway: Gateway) -> list[Any]:
    """For a route that changes what is served. NotAuthorized without a key or token, AdminRequired with another's."""

    async def admin(request: Request) -> None:
        given = request.headers.get("authorization", "")
        tenant = gateway.tenants.identify(given)
        request.state.record.tell(tenant=tenant.name)
        if gateway.tenants.is_admin(given, tenant):
            return
        if gateway.tenants.keyed:
            raise AdminRequired("this needs an admin's key")
        raise NotAuthorized("this changes what is served: send the admin token as `Authorization: Bearer …`")

    return [Depends(admin)]
