"""Speaks MCP over stdio with npm `replicate-mcp` and prints what it saw as JSON."""

import base64
import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path

environment = {
    "PATH": os.environ["PATH"],
    "REPLICATE_API_TOKEN": os.environ["TOKEN"],
    "REPLICATE_BASE_URL": os.environ["URL"] + "/v1",
}
program = Path(os.environ["CLIENTS"]) / "npm/node_modules/replicate-mcp/index.js"
server = subprocess.Popen(
    ["node", str(program)],
    env=environment,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
)
numbers = iter(range(1, 1000))


def send(message):
    server.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    server.stdin.flush()


def ask(method, params):
    number = next(numbers)
    send({"id": number, "method": method, "params": params})
    while True:
        answer = json.loads(server.stdout.readline())
        if answer.get("id") == number:
            return answer["result"]


def call(tool, **arguments):
    result = ask("tools/call", {"name": tool, "arguments": arguments})
    text = result["content"][0]["text"]
    if result.get("isError"):
        raise RuntimeError(text)
    return json.loads(text)


def main():
    client = {"name": "tests", "version": "1"}
    ask("initialize", {"protocolVersion": "2025-03-26", "capabilities": {}, "clientInfo": client})
    send({"method": "notifications/initialized"})
    tools = [tool["name"] for tool in ask("tools/list", {})["tools"]]
    searched = call("search_models", body="controlnet tile")
    found = call("list_models")
    picture = base64.b64encode(Path(os.environ["IMAGE"]).read_bytes()).decode()
    given = {"image": f"data:image/png;base64,{picture}"}
    made = call("create_predictions", version="tegula/upscale", input=given)
    while made["status"] in ("starting", "processing"):
        time.sleep(0.05)
        made = call("get_predictions", prediction_id=made["id"])
    written = base64.b64decode(made["output"].partition(",")[2])
    Path(os.environ["OUTPUT"]).write_bytes(written)
    link = call("list_predictions")["results"][0]["output"]
    with urllib.request.urlopen(link) as answer:
        fetched = answer.read()
    seen = {
        "tools": len(tools),
        "found": "high-resolution-controlnet-tile" in json.dumps(found),
        "status": made["status"],
        "output": made["output"][:14],
        "account": call("get_account")["username"],
        "searched": searched,
        "fetched": fetched == written,
    }
    print(json.dumps(seen))


try:
    main()
finally:
    server.terminate()
    server.wait()
