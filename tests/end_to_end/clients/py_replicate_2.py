"""Drives PyPI `replicate` 2.x and prints what it saw as JSON."""

import asyncio
import json
import os
import traceback
from pathlib import Path

import replicate
from replicate import AsyncReplicate, Replicate

IMAGE = Path(os.environ["IMAGE"])
MODEL = "batouresearch/high-resolution-controlnet-tile:latest"
MODEL_NAME = {"model_owner": "tegula", "model_name": "upscale"}
TOKEN, URL = os.environ["TOKEN"], os.environ["URL"] + "/v1"
os.environ |= {"REPLICATE_API_TOKEN": TOKEN, "REPLICATE_BASE_URL": URL}
client = Replicate(bearer_token=TOKEN, base_url=URL)


def guide():
    given = {"image": IMAGE.open("rb"), "hdr": 0.2, "guess_mode": False}
    return [item.read()[1:4].decode() for item in client.run(MODEL, input=given)]


def single():
    return len(client.run("tegula/upscale", input={"image": IMAGE.open("rb")}).read())


def enlarged():
    output = client.run("tegula/upscale", input={"image": IMAGE.open("rb")})
    Path(os.environ["OUTPUT"]).write_bytes(output.read())


def used():
    model = replicate.use("tegula/upscale")
    made = Path(model(image=IMAGE.open("rb")))
    return [made.suffix, made.read_bytes()[1:4].decode()]


def used_in_async():
    async def run():
        model = replicate.use("tegula/upscale", use_async=True)
        made = Path(await model(image=IMAGE.open("rb")))
        return [made.suffix, made.read_bytes()[1:4].decode()]

    return asyncio.run(run())


def restarted():
    sizes = []
    for _ in range(4):
        with IMAGE.open("rb") as image:
            output = client.run("tegula/upscale", input={"image": image, "prompt": "slow"})
            sizes.append(len(output.read()))
    return sizes


def in_async():
    async def run():
        async with AsyncReplicate(bearer_token=TOKEN, base_url=URL) as own:
            output = await own.run("tegula/upscale", input={"image": IMAGE.open("rb")})
            return len(await output.read())

    return asyncio.run(run())


def streamed():
    items = list(client.stream("tegula/upscale", input={"image": IMAGE.open("rb")}))
    return len(items)


def cancelled():
    uri = client.files.create(content=IMAGE.read_bytes()).urls.get
    given = {"image": uri, "prompt": "gated"}
    made = client.models.predictions.create(model_owner="tegula", model_name="upscale", input=given)
    return client.predictions.cancel(prediction_id=made.id).status


def failed():
    try:
        client.run("tegula/upscale", input={"image": IMAGE.open("rb"), "prompt": "fail"})
    except Exception as error:
        return [type(error).__name__, str(error)]


def files():
    made = client.files.create(content=IMAGE.read_bytes())
    got = client.files.get(file_id=made.id)
    listed = any(one.id == made.id for one in client.files.list())
    client.files.delete(file_id=made.id)
    return [got.content_type, listed]


def lists():
    return {
        "predictions": len({one.id for one in client.predictions.list()}),
        "search": [found.name for found in client.models.search(body="controlnet tile")],
        "versions": len(list(client.models.versions.list(**MODEL_NAME))),
        "hardware": [one.sku for one in client.hardware.list()],
        "account": client.account.get().username,
        "found": [one.model.name for one in client.search(query="controlnet tile").models],
        "collections": [one.slug for one in client.collections.list()],
    }


def main():
    seen = {}
    steps = (guide, single, enlarged, used, used_in_async, in_async)
    steps = (*steps, streamed, cancelled, failed, files, lists)
    wanted = os.environ.get("STEPS", "").split()
    wanted = wanted or [step.__name__ for step in steps]
    for step in (step for step in (*steps, restarted) if step.__name__ in wanted):
        try:
            seen[step.__name__] = step()
        except Exception:
            seen[step.__name__] = traceback.format_exc()
    print(json.dumps(seen))


main()
