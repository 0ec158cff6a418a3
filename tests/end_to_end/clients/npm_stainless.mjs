// Drives npm `replicate-stainless` and prints what it saw as JSON.
import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";

const require = createRequire(process.env.CLIENTS + "/npm/");
const Replicate = require("replicate-stainless").default;
const client = new Replicate({ bearerToken: process.env.TOKEN, baseURL: process.env.URL + "/v1" });
const image = await readFile(process.env.IMAGE);
const dataUri = `data:image/png;base64,${image.toString("base64")}`;
const seen = {};

async function guide() {
  const model = "batouresearch/high-resolution-controlnet-tile:latest";
  const output = await client.run(model, { input: { image, hdr: 0.2, guess_mode: false }, useFileOutput: true, wait: { mode: "block" } });
  await writeFile(process.env.OUTPUT, await output[0].blob().then((blob) => blob.bytes?.() ?? blob.arrayBuffer()).then((data) => Buffer.from(data)));
  return (await readFile(process.env.OUTPUT)).subarray(1, 4).toString();
}

async function enlarged() {
  const output = await client.run("tegula/upscale", { input: { image }, useFileOutput: true });
  await writeFile(process.env.OUTPUT, Buffer.from(await (await output.blob()).arrayBuffer()));
}

async function polled() {
  const output = await client.run("tegula/upscale", { input: { image } });
  return String(output).slice(0, 14);
}

async function files() {
  const made = await client.files.create({ content: new File([image], "photo.png", { type: "image/png" }) });
  const got = await client.files.get({ file_id: made.id });
  await client.files.delete({ file_id: made.id });
  return [got.content_type, got.size === image.length];
}

async function cancelled() {
  const made = await client.predictions.create({ version: "tegula/upscale", input: { image: dataUri, prompt: "gated" } });
  return (await client.predictions.cancel({ prediction_id: made.id })).status;
}

async function lists() {
  const predictions = [];
  for await (const one of client.predictions.list()) predictions.push(one.id);
  const found = await client.models.search({ body: "controlnet tile" });
  return {
    predictions: new Set(predictions).size,
    models: (found.results ?? found.models ?? []).map((one) => one.name),
    account: (await client.account.get()).username,
    hardware: (await client.hardware.list()).map((one) => one.sku),
    readme: (await client.models.readme.get({ model_owner: "tegula", model_name: "upscale" })).startsWith("# tegula/upscale"),
  };
}

const wanted = process.env.STEPS?.split(" ");
for (const step of [guide, enlarged, polled, files, cancelled, lists].filter((step) => !wanted || wanted.includes(step.name))) {
  try {
    seen[step.name] = await step();
  } catch (error) {
    seen[step.name] = `threw ${error.stack}`;
  }
}
console.log(JSON.stringify(seen));
