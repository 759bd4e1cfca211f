"""Where the packages lie: the folder wave/ installs as waveos, the other rooms below it (waveos.agents, waveos.host, ...).

The name `wave` itself belongs to a module of the standard library. scenarios/ holds no code; it installs as data, so that
`wave run rocksdb` finds what it names wherever Wave is installed. Python of wave/proto/*.proto is made here, beside it, before
packages are looked for: so a wheel brings it, and an editable install finds it.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOMS = {
    "waveos": "wave",
    "waveos.agents": "agents",
    "waveos.host": "host",
    "waveos.ipu_emulator": "ipu_emulator",
    "waveos.bench": "bench",
    "waveos.scenarios": "scenarios",
}


def generate(source: Path) -> None:
    """NAME_pb2.py, NAME_pb2.pyi and NAME_pb2_grpc.py, unless they are there and newer."""
    made = [source.with_name(source.stem + ending) for ending in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")]
    if all(each.exists() and each.stat().st_mtime >= source.stat().st_mtime for each in made):
        return
    try:
        import grpc_tools
        from grpc_tools import protoc
    except ImportError:
        sys.exit(f"{source}: its Python is made by grpcio-tools, which is not installed: pip install grpcio-tools, or build with isolation")
    out = Path("build/proto")
    out.mkdir(parents=True, exist_ok=True)
    common = os.path.join(os.path.dirname(grpc_tools.__file__), "_proto")
    places = [f"-Iwaveos/proto={source.parent}", f"-I{common}"]  # it is to be imported as waveos.proto.NAME_pb2
    if protoc.main(["protoc", *places, *(f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")), f"waveos/proto/{source.name}"]):
        sys.exit(f"{source} does not compile")
    for each in made:
        os.replace(out / "waveos/proto" / each.name, each)


for proto in sorted(Path("wave/proto").glob("*.proto")):
    generate(proto)

setup(
    package_dir=ROOMS,
    packages=[f"{name}.{inner}" if inner else name for name, folder in ROOMS.items() for inner in ("", *find_packages(folder))],
)
