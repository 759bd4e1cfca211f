"""BPF programs from Python, through the system's libbpf (1.4 or newer): no compiler at run time, no bcc, no numba.

`Object` loads a compiled file; `Map` is a table or shared memory (NumPy); `Program` is attached, or run by a call; `Link` is what is attached, struct_ops
included; `RingBuffer` and `UserRingBuffer` carry records without system calls. What the kernel or libbpf refuses is a `BpfError`, one line that
says why and then the log. Objects are compiled from `*.bpf.c` by `make bpf`; C programs include `kernel.h` and the generated `wave_records.h`.
"""

from waveos.host.bpf.library import BpfError
from waveos.host.bpf.map import Map
from waveos.host.bpf.object import Object
from waveos.host.bpf.program import Link, Program
from waveos.host.bpf.rings import RingBuffer, UserRingBuffer

__all__ = ["BpfError", "Link", "Map", "Object", "Program", "RingBuffer", "UserRingBuffer"]
