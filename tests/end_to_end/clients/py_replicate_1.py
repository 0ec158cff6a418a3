"""Drives PyPI `replicate` 1.x and prints what it saw as JSON."""

import asyncio
import json
import os
import traceback
from pathlib import Path

import replicate
from replicate.exceptions import ModelError, ReplicateError
from replicate.pagination import paginate

IMAGE = Path(os.environ["IMAGE"])
MODEL = "batouresearch/high-resolution-controlnet-tile:latest"
client = replicate.Client(api_token=os.environ["TOKEN"], base_url=os.environ["URL"])


def guide():
    with IMAGE.open("rb") as image:
        output = client.run(MODEL, input={"image": image, "hdr": 0.2, "guess_mode": False})
    return [item.read()[1:4].decode() for item in output]


def single():
    with IMAGE.open("rb") as image:
        output = client.run("tegula/upscale", input={"image": image})
    return output.read()[1:4].decode()


def enlarged():
    with IMAGE.open("rb") as image:
        output = client.run("tegula/upscale", input={"image": image})
    Path(os.environ["OUTPUT"]).write_bytes(output.read())


def base64():
    with IMAGE.open("rb") as image:
        given = {"image": image}
        output = client.run("tegula/upscale", input=given, file_encoding_strategy="base64")
    return len(output.read())


def restarted():
    sizes = []
    for _ in range(4):
        with IMAGE.open("rb") as image:
            output = client.run("tegula/upscale", input={"image": image, "prompt": "slow"})
            sizes.append(len(output.read()))
    return sizes


def in_async():
    async def run():
        with IMAGE.open("rb") as image:
            output = await client.async_run("tegula/upscale", input={"image": image})
        return len(await output.aread())

    return asyncio.run(run())


def streamed():
    with IMAGE.open("rb") as image:
        made = client.predictions.create(
            model="tegula/upscale", input={"image": image}, stream=True
        )
    return [event.event.value for event in made.stream()]


def by_module():
    """The functions of the module, which take address and token from the environment."""

    async def run():
        with IMAGE.open("rb") as image:
            output = await replicate.async_run("tegula/upscale", input={"image": image})
        with IMAGE.open("rb") as image:
            given = {"image": image}
            events = await replicate.async_stream("tegula/upscale", input=given)
            return len(await output.aread()), [event.event.value async for event in events]

    with IMAGE.open("rb") as image:
        output = replicate.run("tegula/upscale", input={"image": image})
    with IMAGE.open("rb") as image:
        events = list(replicate.stream("tegula/upscale", input={"image": image}))
    return [len(output.read()), [event.event.value for event in events], *asyncio.run(run())]


def progressed():
    with IMAGE.open("rb") as image:
        made = client.predictions.create(model="tegula/upscale", input={"image": image})
    made.wait()
    return [made.status, made.progress.percentage]


def cancelled():
    with IMAGE.open("rb") as image:
        given = {"image": image, "prompt": "gated"}
        made = client.predictions.create(model="tegula/upscale", input=given)
    made.cancel()
    made.reload()
    return made.status


def failed():
    try:
        with IMAGE.open("rb") as image:
            client.run("tegula/upscale", input={"image": image, "prompt": "fail"})
    except ModelError as error:
        return str(error)


def refused():
    try:
        client.run("tegula/upscale", input={"image": "https://x.example/a.png", "scale": 99})
    except ReplicateError as error:
        return [error.status, error.title]


def files():
    made = client.files.create(IMAGE, metadata={"kind": "test"})
    got = client.files.get(made.id)
    listed = any(one.id == made.id for one in client.files.list())
    client.files.delete(made.id)
    return [got.content_type, got.metadata, listed]


def lists():
    model = client.models.get("tegula/upscale")
    return {
        "schema": sorted(model.latest_version.openapi_schema["components"]["schemas"])[:2],
        "versions": len(model.versions.list()),
        "pages": [len(page.results) for page in paginate(client.predictions.list)],
        "search": [found.name for found in client.models.search("controlnet tile")],
        "collection": len(client.collections.get("super-resolution").models),
        "hardware": [one.sku for one in client.hardware.list()],
        "account": client.accounts.current().username,
        "secret": client.webhooks.default.secret().key.startswith("whsec_"),
        "trainings": len(client.trainings.list()),
    }


def deployment():
    version = client.models.get("tegula/upscale").latest_version.id
    client.deployments.create(
        name="one", model="tegula/upscale", version=version, hardware="cpu",
        min_instances=0, max_instances=1,
    )  # fmt: skip
    with IMAGE.open("rb") as image:
        made = client.deployments.predictions.create("ana/one", input={"image": image})
    made.wait()
    client.deployments.delete("ana", "one")
    return made.status


def main():
    wanted = os.environ.get("STEPS", "").split()
    steps = (guide, single, enlarged, base64, in_async, streamed, by_module)
    steps = (*steps, progressed, cancelled, failed, refused, files, lists, deployment)
    seen = {}
    wanted = wanted or [step.__name__ for step in steps]
    for step in (step for step in (*steps, restarted) if step.__name__ in wanted):
        try:
            seen[step.__name__] = step()
        except Exception:
            seen[step.__name__] = traceback.format_exc()
    print(json.dumps(seen))


main()
