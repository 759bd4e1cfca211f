"""AF_XDP from Python: packets of one UDP port come to a process past the kernel's network stack, into memory it shares with the kernel.

`Port` is what one opens; it consists of a `Umem` (the packets' memory), an `XskSocket` (four rings), `Frames` (which frames are free) and a `Redirect` (the
XDP program that picks the service's packets while someone serves them). Nothing of that needs a compiler. What is done with packets is: the steps of
`waveos.host.xsk.rings`, called in a loop of one's own that numba compiles; `waveos.host.xsk.echo` is the smallest such loop.
"""

from waveos.host.xsk.abi import PACKET
from waveos.host.xsk.frames import Frames
from waveos.host.xsk.port import Port
from waveos.host.xsk.program import Redirect
from waveos.host.xsk.socket import Facts, XskSocket
from waveos.host.xsk.umem import Umem

__all__ = ["PACKET", "Facts", "Frames", "Port", "Redirect", "Umem", "XskSocket"]
