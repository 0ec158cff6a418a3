// Drives npm `replicate` and prints what it saw as JSON.
import { createServer } from "node:http";
import { once } from "node:events";
import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { setTimeout as sleep } from "node:timers/promises";

const require = createRequire(process.env.CLIENTS + "/npm/");
const { default: Replicate, validateWebhook, parseProgressFromLogs } = await load();
const replicate = new Replicate({ auth: process.env.TOKEN, baseUrl: process.env.URL + "/v1" });
const image = await readFile(process.env.IMAGE);
const model = "batouresearch/high-resolution-controlnet-tile:latest";
const seen = {};

async function load() {
  const module = require("replicate");
  return { default: module, validateWebhook: module.validateWebhook, parseProgressFromLogs: module.parseProgressFromLogs };
}

async function guide() {
  const output = await replicate.run(model, {
    input: {
      hdr: 0.2, image, steps: 20, prompt: "a woman wearing a colorful suit", scheduler: "DDIM",
      creativity: 0.6, guess_mode: false, resolution: 2560, resemblance: 0.4, guidance_scale: 5,
    },
  });
  await writeFile(process.env.OUTPUT, output[0]);
  const given = (await replicate.predictions.list()).results[0].input;
  return { kind: (await readFile(process.env.OUTPUT)).subarray(1, 4).toString(), uploaded: new URL(given.image).pathname.startsWith("/v1/files/") };
}

async function uploaded() {
  const made = await replicate.files.create(image); // a Buffer
  const output = await replicate.run("tegula/upscale", { input: { image: made.urls.get } });
  const again = await (await fetch(made.urls.get, { headers: { authorization: `Bearer ${process.env.TOKEN}`, accept: "image/png" } })).arrayBuffer();
  return { same: image.equals(Buffer.from(again)), bytes: (await output.blob()).size };
}

async function enlarged() {
  await writeFile(process.env.OUTPUT, await replicate.run("tegula/upscale", { input: { image } }));
}

async function restarted() {
  const sizes = [];
  for (let number = 0; number < 4; number++) {
    const output = await replicate.run("tegula/upscale", { input: { image, prompt: "slow" } });
    sizes.push((await output.blob()).size);
  }
  return sizes;
}

async function polled() {
  const steps = [];
  const output = await replicate.run("tegula/upscale", { input: { image }, wait: { mode: "poll", interval: 20 } },
    (prediction) => steps.push(parseProgressFromLogs(prediction)?.percentage ?? 0));
  return { bytes: (await output.blob()).size, last: steps.at(-1) };
}

async function streamed() {
  const events = [];
  for await (const event of replicate.stream("tegula/upscale", { input: { image } })) events.push(event);
  const file = events.find((event) => event.event === "output").data;
  return { kinds: events.map((event) => event.event), bytes: (await file.blob()).size };
}

async function aborted() {
  const controller = new AbortController();
  let id;
  await replicate.run("tegula/upscale", { input: { image, prompt: "gated" }, signal: controller.signal, wait: { mode: "poll", interval: 20 } },
    (prediction) => { id = prediction.id; if (prediction.status === "processing") controller.abort(); });
  return (await replicate.predictions.get(id)).status;
}

async function failed() {
  try {
    await replicate.run("tegula/upscale", { input: { image, prompt: "fail" } });
  } catch (error) {
    return error.message;
  }
}

async function refused() {
  try {
    await replicate.run("tegula/upscale", { input: { image, scale: 99 } });
  } catch (error) {
    return [error.response.status, error.message.includes("input.scale")];
  }
}

async function files() {
  const made = await replicate.files.create(new Blob([image]), { kind: "test" });
  const got = await replicate.files.get(made.id);
  const listed = (await replicate.files.list()).results.some((file) => file.id === made.id);
  const gone = await replicate.files.delete(made.id);
  return { type: got.content_type, metadata: got.metadata, listed, gone };
}

async function webhook() {
  const received = [];
  const hook = createServer(async (request, response) => {
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    received.push({ headers: request.headers, body: Buffer.concat(chunks).toString() });
    response.end();
  }).listen(0, "127.0.0.1");
  await once(hook, "listening");
  const url = `http://127.0.0.1:${hook.address().port}/`;
  await replicate.predictions.create({ model: "tegula/upscale", input: { image }, webhook: url, webhook_events_filter: ["completed"] });
  for (let wait = 0; wait < 6000 && received.length === 0; wait++) await sleep(50);
  hook.close();
  const { key } = await replicate.webhooks.default.secret.get();
  const [message] = received;
  const parsed = { ...message, body: JSON.parse(message.body) };
  return {
    status: parsed.body.status,
    valid: await validateWebhook(message, key),
    parsed: await validateWebhook(parsed, key),
    tampered: await validateWebhook({ ...message, body: message.body + " " }, key),
  };
}

async function lists() {
  const models = (await replicate.models.search("controlnet")).results.map((found) => `${found.owner}/${found.name}`);
  const pages = [];
  for await (const page of replicate.paginate(replicate.predictions.list)) pages.push(page.length);
  const versions = (await replicate.models.versions.list("tegula", "upscale")).results.length;
  const collections = (await replicate.collections.list()).results.map((one) => one.slug);
  const collection = (await replicate.collections.get("super-resolution")).models.length;
  const hardware = (await replicate.hardware.list()).map((one) => one.sku);
  const account = (await replicate.accounts.current()).username;
  const trainings = (await replicate.trainings.list()).results.length;
  return { models, pages, versions, collections, collection, hardware, account, trainings };
}

async function deployments() {
  const version = (await replicate.models.get("tegula", "upscale")).latest_version.id;
  await replicate.deployments.create({ name: "fast", model: "tegula/upscale", version, hardware: "cpu", min_instances: 0, max_instances: 1 });
  const changed = await replicate.deployments.update("ana", "fast", { max_instances: 2 });
  const made = await replicate.deployments.predictions.create("ana", "fast", { input: { image } });
  const done = await replicate.wait(made, { interval: 20 });
  const listed = (await replicate.deployments.list()).results.length;
  const gone = await replicate.deployments.delete("ana", "fast");
  return { number: changed.current_release.number, status: done.status, deployment: done.deployment, listed, gone };
}

const wanted = process.env.STEPS?.split(" ");
const steps = [guide, uploaded, enlarged, polled, streamed, aborted, failed, refused, files, webhook, lists, deployments, restarted];
for (const step of steps.filter((step) => wanted ? wanted.includes(step.name) : step !== restarted)) {
  try {
    seen[step.name] = await step();
  } catch (error) {
    seen[step.name] = `threw ${error.stack}`;
  }
}
console.log(JSON.stringify(seen));
