"""What the process has imported from which the chaos tests fork servers and workers.

It also leaves all of that out of searches for garbage, which would copy every page of it in each
process that is forked.
"""

import gc
from importlib import import_module

from sqlalchemy.orm import configure_mappers

for name in (
    "chaos_support",
    "tegula.cli.program",
    "tegula.server.api.app",
    "tegula.server.api.connections",
    "tegula.server.supervisor",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.server",
    # What these import when they first need it.
    "anyio._backends._asyncio",
    "concurrent.futures.process",
    "encodings.idna",
    "uvloop",
):
    import_module(name)

configure_mappers()
gc.collect()
gc.freeze()
