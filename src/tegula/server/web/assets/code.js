// What is on the form as code that runs as it stands: for Python and Node.js without any package, for
// a shell, and for tegula's own command line.

import { local } from "./api.js";

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const stem = (name) => name.replace(/\.[^.]*$/, "") || name;

// Files are told apart from texts: {file: name}.
function marked(inputs) {
  return Object.entries(inputs).map(([name, value]) => [name, value instanceof Blob ? { file: value.name } : value]);
}

const isFile = (value) => value !== null && typeof value === "object" && "file" in value;

function curl({ server, token, model, inputs }) {
  const escapedForHeredoc = (text) => text.replace(/[\\$`]/g, "\\$&");
  const value = (one) =>
    isFile(one)
      ? `"data:application/octet-stream;base64,$(base64 < ${quoted(one.file)} | tr -d '\\n')"`
      : escapedForHeredoc(JSON.stringify(one));
  const lines = inputs.map(([name, one]) => `    ${JSON.stringify(name)}: ${value(one)}`).join(",\n");
  const proof = token ? ` -H "Authorization: Bearer $TEGULA_TOKEN"` : "";
  return `curl -sS ${server}/v1/predictions${proof} \\
  -H "Content-Type: application/json" -H "Prefer: wait" -d @- <<END
{
  "version": ${JSON.stringify(model)},
  "input": {
${lines}
  }
}
END`;
}

function python({ server, token, model, inputs, result }) {
  const literal = (value) => (value === true ? "True" : value === false ? "False" : JSON.stringify(value));
  const lines = inputs.map(([name, value]) => `    ${JSON.stringify(name)}: ${isFile(value) ? `read(${JSON.stringify(value.file)})` : literal(value)},\n`);
  const proof = token ? `\nHEADERS["Authorization"] = f"Bearer {os.environ['TEGULA_TOKEN']}"` : "";
  return `import base64
import json
import os
import time
import urllib.request

SERVER = ${JSON.stringify(server)}
HEADERS = {"Content-Type": "application/json"}${proof}


def call(address, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, HEADERS)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def read(path):
    with open(path, "rb") as file:
        return "data:application/octet-stream;base64," + base64.b64encode(file.read()).decode()


inputs = {
${lines.join("")}}
prediction = call(f"{SERVER}/v1/predictions", {"version": ${JSON.stringify(model)}, "input": inputs})
while prediction["status"] in ("starting", "processing"):
    time.sleep(1)
    prediction = call(f"{SERVER}/v1/predictions/{prediction['id']}")
if prediction["status"] != "succeeded":
    raise SystemExit(prediction["error"] or prediction["status"])
output = prediction["output"]
for number, address in enumerate([output] if isinstance(output, str) else output):
    path = ${JSON.stringify(stem(result))} + f"-{number}.${result.split(".").pop()}"
    with urllib.request.urlopen(address) as picture, open(path, "wb") as file:
        file.write(picture.read())
    print(path)`;
}

function javascript({ server, token, model, inputs, result }) {
  const lines = inputs.map(([name, value]) => `  ${JSON.stringify(name)}: ${isFile(value) ? `await read(${JSON.stringify(value.file)})` : JSON.stringify(value)},\n`);
  const proof = token ? ", Authorization: `Bearer ${process.env.TEGULA_TOKEN}`" : "";
  return `import { readFile, writeFile } from "node:fs/promises";

const SERVER = ${JSON.stringify(server)};
const headers = { "Content-Type": "application/json"${proof} };

async function call(address, body) {
  const method = body ? "POST" : "GET";
  const answer = await fetch(address, { method, headers, body: body && JSON.stringify(body) });
  if (!answer.ok) throw new Error((await answer.json()).detail);
  return answer.json();
}

async function read(path) {
  return \`data:application/octet-stream;base64,\${(await readFile(path)).toString("base64")}\`;
}

const input = {
${lines.join("")}};
let prediction = await call(\`\${SERVER}/v1/predictions\`, { version: ${JSON.stringify(model)}, input });
while (["starting", "processing"].includes(prediction.status)) {
  await new Promise((resolve) => setTimeout(resolve, 1000));
  prediction = await call(\`\${SERVER}/v1/predictions/\${prediction.id}\`);
}
if (prediction.status !== "succeeded") throw new Error(prediction.error ?? prediction.status);
for (const [number, address] of [prediction.output].flat().entries()) {
  const path = ${JSON.stringify(stem(result))} + \`-\${number}.${result.split(".").pop()}\`;
  await writeFile(path, Buffer.from(await (await fetch(address)).arrayBuffer()));
  console.log(path);
}`;
}

function command({ server, model, inputs }) {
  const words = inputs.map(([name, value]) => quoted(`${name}=${isFile(value) ? `@${value.file}` : value}`));
  return [`tegula run --server ${quoted(server)} ${model}`, ...words].join(" \\\n  ");
}

const TOKEN = "TEGULA_TOKEN holds a token: export TEGULA_TOKEN=$(tegula tokens create NAME) on the server’s machine makes one.";

export const KINDS = {
  curl: { label: "curl", write: curl, note: "For a shell. The answer names the result, or says where to ask again after a minute." },
  python: { label: "Python", write: python, note: "For Python 3, without any package." },
  javascript: { label: "JavaScript", write: javascript, note: "For Node.js 18 and later, as a file with the ending .mjs, without any package." },
  command: { label: "tegula run", write: command, note: "On any machine with tegula, which does the work itself without --server." },
};

// Return {text, note}: the code for a model with these inputs, of which files are Blobs with a name.
export function writeCode(kind, { model, inputs, hasTokens, result }) {
  const server = local("/").replace(/\/$/, "");
  const { write, note } = KINDS[kind];
  const text = write({ server, token: hasTokens, model, inputs: marked(inputs), result });
  return { text, note: hasTokens ? `${note} ${TOKEN}` : note };
}
