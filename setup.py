"""Where the packages lie: the folder wave/ installs as waveos, the other rooms below it (waveos.agents, waveos.host, ...).

The name `wave` itself belongs to a module of the standard library. scenarios/ holds no code; it installs as data, so that
`wave run rocksdb` finds what it names wherever Wave is installed.
"""

from setuptools import find_packages, setup

ROOMS = {
    "waveos": "wave",
    "waveos.agents": "agents",
    "waveos.host": "host",
    "waveos.ipu_emulator": "ipu_emulator",
    "waveos.bench": "bench",
    "waveos.scenarios": "scenarios",
}

setup(
    package_dir=ROOMS,
    packages=[f"{name}.{inner}" if inner else name for name, folder in ROOMS.items() for inner in ("", *find_packages(folder))],
)
