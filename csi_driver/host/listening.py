"""Where a server listens."""

import socket
from typing import Final

_BACKLOG: Final = 64


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Without a host at every address, of IPv6 too where there is such a thing: clusters
    can be IPv6 only. Raises OSError.
    """
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, dualstack_ipv6=both, backlog=_BACKLOG)
