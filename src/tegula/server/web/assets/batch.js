// Several pictures with the same settings: each is a prediction of its own. How far all are, and the
// results as one zip file under the names of their sources.

import { call, local } from "./api.js";
import { at, attempt, element, formatBytes } from "./dom.js";
import { create, pictureOf, resultName } from "./sending.js";
import { distinct, zipOf } from "./zip.js";

const KEY = "tegula-batch";
const SENDING_AT_ONCE = 2;
const WATCHED_AT_ONCE = 4; // the server works in order, so that the others wait
const LOOK_AGAIN_MS = 1500;
const ENDED = ["succeeded", "failed", "canceled", "aborted"];
const WORDS = { waiting: "Waiting to be sent", sending: "Sending", starting: "Waiting", processing: "Running",
  succeeded: "Done", failed: "Failed", canceled: "Cancelled", aborted: "Deadline passed" };
const TYPES = { jpg: "image/jpeg", webp: "image/webp", png: "image/png" };

let batch = null; // {model, inputs, items}; an item is {name, id, state, text, picture}
let parts = null;
let stop = null;
let timer = 0;

export function startBatch(model, pictures, inputs) {
  const items = pictures.map((picture) => ({ name: picture.name, id: null, state: "waiting", text: "", picture }));
  batch = { model, inputs, items };
  stop = new AbortController();
  open();
  const queue = [...items];
  const work = async () => {
    for (let item = queue.shift(); item; item = queue.shift()) await send(item);
  };
  for (let worker = 0; worker < SENDING_AT_ONCE; worker++) work();
}

async function send(item) {
  if (item.state !== "waiting") return;
  item.state = "sending";
  try {
    const say = (text) => {
      item.text = text;
      show();
    };
    const prediction = await create(batch.model, item.picture, batch.inputs, say, stop.signal);
    Object.assign(item, { id: prediction.id, state: prediction.status, text: "" });
  } catch (error) {
    const stopped = error.name === "AbortError" || stop.signal.aborted;
    Object.assign(item, { state: stopped ? "canceled" : "failed", text: stopped ? "" : error.message });
  }
  item.picture = null;
  keep();
  show();
}

// The ids outlive a reload of the page; pictures that were not sent yet do not.
function keep() {
  const items = batch.items.filter(({ id }) => id).map(({ name, id }) => ({ name, id }));
  const inputs = Object.fromEntries(Object.entries(batch.inputs).filter(([, value]) => !(value instanceof Blob)));
  sessionStorage.setItem(KEY, JSON.stringify({ model: batch.model.name, inputs, items }));
}

export function resumeBatch(server) {
  const kept = JSON.parse(sessionStorage.getItem(KEY) || "null");
  const model = kept && server.models.find((one) => one.name === kept.model);
  if (!model || !kept.items.length) return;
  stop = new AbortController();
  batch = { model, inputs: kept.inputs, items: kept.items.map((item) => ({ ...item, state: "starting", text: "", picture: null })) };
  open();
}

window.addEventListener("beforeunload", (event) => {
  if (batch?.items.some(({ state }) => ["waiting", "sending"].includes(state))) event.preventDefault();
});

function open() {
  parts = build();
  at("batch").replaceChildren(...parts.all);
  at("batch").hidden = false;
  show();
  clearTimeout(timer);
  watch();
}

function build() {
  const title = element("h2", { id: "batch-title", textContent: `${batch.items.length} pictures` });
  const bar = element("progress", { max: batch.items.length, "aria-label": "Share of the pictures that are done" });
  const said = element("p", { id: "batch-status", role: "status" });
  const rows = batch.items.map(row);
  const cancel = element("button", { type: "button", id: "batch-cancel", textContent: "Cancel the rest" });
  cancel.addEventListener("click", cancelRest);
  const close = element("button", { type: "button", id: "batch-close", textContent: "Close" });
  close.addEventListener("click", () => {
    sessionStorage.removeItem(KEY);
    clearTimeout(timer);
    at("batch").hidden = true;
    batch = null;
  });
  const format = element("select", { id: "zip-format" }, ...["as they are", "jpg", "webp", "png"].map((value) => element("option", { value, textContent: value })));
  const quality = element("input", { id: "zip-quality", type: "number", min: 1, max: 100, value: 90, disabled: true });
  format.addEventListener("change", () => (quality.disabled = !["jpg", "webp"].includes(format.value)));
  const zip = element("button", { type: "button", id: "zip", className: "main", textContent: "Download as one zip" });
  zip.addEventListener("click", () => download(format.value, Number(quality.value), zip));
  const tools = element(
    "div",
    { className: "row zip-tools" },
    element("label", {}, "Format ", format),
    element("label", {}, "Quality ", quality),
    zip,
  );
  const note = element("p", { className: "soft", textContent: "Another format is written by this browser, with 8 bits a channel and without metadata; choose the format of the model to keep them. Up to 4 GB." });
  const list = element("ul", { className: "plain" }, ...rows.map((one) => one.root));
  return { all: [title, bar, said, element("div", { className: "row" }, cancel, close), tools, note, list], bar, said, rows, cancel, close, tools, note, zip };
}

function row(item) {
  const name = element("span", { className: "grow", textContent: item.name });
  const state = element("span", { className: "soft" });
  const cancel = element("button", { type: "button", textContent: "Cancel", "aria-label": `Cancel ${item.name}` });
  cancel.addEventListener("click", () => attempt(async () => {
    await cancelOne(item);
    show();
  }));
  return { root: element("li", { className: "row" }, name, state, cancel), name, state, cancel };
}

const count = (...states) => batch.items.filter(({ state }) => states.includes(state)).length;

function show() {
  if (!batch) return;
  const ended = count(...ENDED), done = count("succeeded"), all = batch.items.length;
  parts.bar.value = ended;
  const failed = count("failed", "aborted"), cancelled = count("canceled");
  const words = [`${done} of ${all} done`, failed && `${failed} failed`, cancelled && `${cancelled} cancelled`];
  parts.said.textContent = `${words.filter(Boolean).join(", ")}.`;
  parts.cancel.hidden = ended === all;
  parts.close.hidden = ended < all;
  parts.tools.hidden = parts.note.hidden = !done;
  parts.zip.textContent = `Download ${done} as one zip`;
  batch.items.forEach((item, place) => {
    const { name, state, cancel } = parts.rows[place];
    if (item.id && !name.firstElementChild) name.replaceChildren(element("a", { href: local(`/p/${item.id}`), textContent: item.name }));
    state.textContent = item.text || WORDS[item.state] || item.state;
    state.className = item.state === "failed" ? "error" : "soft";
    cancel.hidden = item.state !== "waiting" && (!item.id || ENDED.includes(item.state));
  });
}

async function watch() {
  if (!batch) return;
  const mine = batch;
  const active = batch.items.filter(({ id, state }) => id && !ENDED.includes(state)).slice(0, WATCHED_AT_ONCE);
  for (const item of active) {
    try {
      const prediction = await call("GET", `/v1/predictions/${item.id}`);
      if (mine !== batch) return;
      Object.assign(item, { state: prediction.status, text: prediction.error || "" });
    } catch (error) {
      if (error.status === 404) Object.assign(item, { state: "failed", text: "It has been removed." });
    }
  }
  show();
  if (batch.items.some(({ state }) => !ENDED.includes(state))) timer = setTimeout(watch, LOOK_AGAIN_MS);
}

async function cancelOne(item) {
  if (item.state === "waiting") item.state = "canceled";
  else if (item.id && !ENDED.includes(item.state)) item.state = (await call("POST", `/v1/predictions/${item.id}/cancel`)).status;
}

function cancelRest() {
  attempt(async () => {
    stop.abort();
    for (const item of batch.items) await cancelOne(item);
    show();
  });
}

// The zip file.

async function converted(blob, format, quality) {
  if (format === "as they are" || (blob.type === TYPES[format] && format === "png")) return blob;
  const bitmap = await createImageBitmap(blob);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const drawing = canvas.getContext("2d");
  if (format === "jpg") {
    drawing.fillStyle = "#fff"; // JPEG has no transparency
    drawing.fillRect(0, 0, bitmap.width, bitmap.height);
  }
  drawing.drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas.convertToBlob({ type: TYPES[format], quality: quality / 100 });
}

async function download(format, quality, button) {
  button.disabled = true;
  const gone = [];
  await attempt(async () => {
    const files = [];
    for (const item of batch.items.filter(({ state }) => state === "succeeded")) {
      parts.said.textContent = `Fetching ${item.name} …`;
      const prediction = await call("GET", `/v1/predictions/${item.id}`);
      const outputs = [prediction.output].flat().filter(Boolean);
      if (!outputs.length) gone.push(item.name);
      for (const output of outputs) {
        const file = await pictureOf(output, "result", prediction.urls);
        const made = await converted(file, format, quality);
        const ending = format === "as they are" ? file.name.split(".").pop() : format;
        files.push({ name: resultName(item.name, batch.model, batch.inputs, ending), blob: made });
      }
    }
    const names = distinct(files.map(({ name }) => name));
    const zip = await zipOf(files.map(({ blob }, place) => ({ name: names[place], blob })));
    const link = element("a", { href: URL.createObjectURL(zip), download: "tegula.zip" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    show();
    parts.said.textContent += ` ${files.length} files, ${formatBytes(zip.size)}, are in tegula.zip.`;
    if (gone.length) parts.said.textContent += ` The server has removed ${gone.join(", ")} already.`;
  });
  button.disabled = false;
}
