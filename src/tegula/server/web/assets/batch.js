// Several pictures with the same settings: each is a prediction of its own. How far all are, and the
// results as one zip file under the names of their sources. Pictures that are chosen while others are
// on their way join the list, with the settings of their own.

import { call, local } from "./api.js";
import { byId, attempt, element, formatBytes, STATUS_WORDS } from "./dom.js";
import { create, pictureOf, resultName } from "./sending.js";
import { createZip, uniqueNames } from "./zip.js";

const KEY = "tegula-batch";
const SENDING_AT_ONCE = 2;
const WATCHED_AT_ONCE = 4; // the server works in order, so that the others wait
const POLL_MS = 1500;
const ENDED = ["succeeded", "failed", "canceled", "aborted"];
const WORDS = { waiting: "Waiting to be sent", sending: "Sending", ...STATUS_WORDS };
const TYPES = { jpg: "image/jpeg", webp: "image/webp", png: "image/png" };

// Each is {name, model, inputs, id, state, text, remedy, picture, stop}: `id` once it is a prediction,
// `picture` until then; `stop`, an AbortController, ends the sending of it.
let items = [];
let parts = null;
let workers = 0;
let timer = 0;

const ended = ({ state }) => ENDED.includes(state);
const unsent = ({ state }) => ["waiting", "sending"].includes(state);
const sendable = ({ state, picture }) => state === "failed" && picture;

export function startBatch(model, pictures, inputs) {
  const added = pictures.map((picture) => (
    { name: picture.name, model, inputs, id: null, state: "waiting", text: "", remedy: null, picture, stop: new AbortController() }));
  items = [...(items.every(ended) ? [] : items), ...added];
  open();
  byId("batch").scrollIntoView({ block: "nearest" });
  sendAll();
}

function sendAll() {
  for (; workers < SENDING_AT_ONCE; workers++) work().finally(() => workers--);
}

async function work() {
  for (let item; (item = items.find(({ state }) => state === "waiting")); ) await send(item);
}

async function send(item) {
  item.state = "sending";
  const { signal } = item.stop;
  try {
    const say = (text) => {
      item.text = text;
      show();
    };
    const prediction = await create(item.model, item.picture, item.inputs, say, signal);
    Object.assign(item, { id: prediction.id, state: prediction.status, text: "", picture: null });
    saveIds();
    watchSoon(POLL_MS);
  } catch (error) {
    if (signal.aborted) Object.assign(item, { state: "canceled", text: "", picture: null });
    else Object.assign(item, { state: "failed", text: error.message, remedy: error.isTemporary ? null : error.remedy });
  }
  show();
}

// The ids outlive a reload of the page; pictures that were not sent yet do not.
function saveIds() {
  const known = items.filter(({ id }) => id).map(({ name, id, model, inputs }) => {
    const plain = Object.entries(inputs).filter(([, value]) => !(value instanceof Blob));
    return { name, id, model: model.name, inputs: Object.fromEntries(plain) };
  });
  sessionStorage.setItem(KEY, JSON.stringify(known));
}

export function resumeBatch(server) {
  const kept = JSON.parse(sessionStorage.getItem(KEY) || "[]");
  const known = kept.map((item) => ({ ...item, model: server.models.find(({ name }) => name === item.model) }));
  items = known.filter(({ model }) => model).map((item) => ({ ...item, state: "starting", text: "", remedy: null, picture: null }));
  if (items.length) open();
}

window.addEventListener("beforeunload", (event) => {
  if (items.some(unsent)) event.preventDefault();
});

function open() {
  parts = build();
  byId("batch").replaceChildren(...parts.all);
  byId("batch").hidden = false;
  show();
  watchSoon(0);
}

function build() {
  const title = element("h2", { id: "batch-title", textContent: `${items.length} pictures` });
  const bar = element("progress", { max: items.length, "aria-label": "Share of the pictures that are done" });
  const summary = element("p", { id: "batch-status", role: "status" });
  const rows = items.map(row);
  const cancel = element("button", { type: "button", id: "batch-cancel", textContent: "Cancel the rest" });
  cancel.addEventListener("click", cancelRest);
  const again = element("button", { type: "button", id: "batch-again" });
  again.addEventListener("click", () => {
    for (const item of items.filter(sendable)) Object.assign(item, { state: "waiting", text: "", remedy: null });
    show();
    sendAll();
  });
  const close = element("button", { type: "button", id: "batch-close", textContent: "Close" });
  close.addEventListener("click", () => {
    sessionStorage.removeItem(KEY);
    byId("batch").hidden = true;
    items = [];
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
  return { all: [title, bar, summary, element("div", { className: "row" }, cancel, again, close), tools, note, list], bar, summary, rows, cancel, again, close, tools, note, zip };
}

function row(item) {
  const name = element("span", { className: "grow", textContent: item.name });
  const state = element("span", { className: "soft" });
  const more = element("span", { hidden: true });
  const cancel = element("button", { type: "button", textContent: "Cancel", "aria-label": `Cancel ${item.name}` });
  cancel.addEventListener("click", () => attempt(async () => {
    await cancelOne(item);
    show();
  }));
  return { root: element("li", { className: "row" }, name, state, more, cancel), name, state, more, cancel };
}

const count = (...states) => items.filter(({ state }) => states.includes(state)).length;

function show() {
  if (!items.length) return;
  const over = count(...ENDED), done = count("succeeded"), all = items.length;
  parts.bar.value = over;
  const failed = count("failed", "aborted"), cancelled = count("canceled");
  const words = [`${done} of ${all} done`, failed && `${failed} failed`, cancelled && `${cancelled} cancelled`];
  parts.summary.textContent = `${words.filter(Boolean).join(", ")}.`;
  parts.cancel.hidden = over === all;
  parts.close.hidden = over < all;
  const again = items.filter(sendable).length;
  parts.again.hidden = !again;
  parts.again.textContent = `Send ${again} again`;
  parts.tools.hidden = parts.note.hidden = !done;
  parts.zip.textContent = `Download ${done} as one zip`;
  items.forEach((item, place) => {
    const { name, state, more, cancel } = parts.rows[place];
    if (item.id && !name.firstElementChild) name.replaceChildren(element("a", { href: local(`/p/${item.id}`), textContent: item.name }));
    state.textContent = item.text || WORDS[item.state] || item.state;
    state.className = item.state === "failed" ? "error" : "soft";
    cancel.hidden = ended(item);
    const remedy = item.id && item.state === "failed" ? "look" : item.remedy ? "error" : "";
    if (more.dataset.remedy === remedy) return; // what has the focus stays
    more.dataset.remedy = remedy;
    more.hidden = !remedy;
    const look = () => element("a", { href: local(`/p/${item.id}`), textContent: "Look at it", "aria-label": `Look at ${item.name}, which failed` });
    more.replaceChildren(...(remedy === "look" ? [look()] : remedy ? [item.remedy] : []));
  });
}

function watchSoon(wait) {
  timer ||= setTimeout(watch, wait); // once at a time
}

async function watch() {
  const active = items.filter((item) => item.id && !ended(item)).slice(0, WATCHED_AT_ONCE);
  for (const item of active) {
    try {
      const prediction = await call("GET", `/v1/predictions/${item.id}`);
      Object.assign(item, { state: prediction.status, text: prediction.error || "" });
    } catch (error) {
      if (error.status === 404) Object.assign(item, { state: "failed", text: "It has been removed." });
    }
  }
  show();
  timer = 0;
  if (items.some((item) => item.id && !ended(item))) watchSoon(POLL_MS);
}

async function cancelOne(item) {
  item.stop?.abort();
  if (item.state === "waiting") item.state = "canceled";
  else if (item.id && !ended(item)) item.state = (await call("POST", `/v1/predictions/${item.id}/cancel`)).status;
}

function cancelRest() {
  attempt(async () => {
    for (const item of items) item.stop?.abort(); // all of them, before the first answer is awaited
    for (const item of items) await cancelOne(item);
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
    for (const item of items.filter(({ state }) => state === "succeeded")) {
      parts.summary.textContent = `Fetching ${item.name} …`;
      const prediction = await call("GET", `/v1/predictions/${item.id}`);
      const outputs = [prediction.output].flat().filter(Boolean);
      if (!outputs.length) gone.push(item.name);
      for (const output of outputs) {
        const file = await pictureOf(output, "result", prediction.urls);
        const made = await converted(file, format, quality);
        const ending = format === "as they are" ? file.name.split(".").pop() : format;
        files.push({ name: resultName(item.name, item.model, item.inputs, ending), blob: made });
      }
    }
    const names = uniqueNames(files.map(({ name }) => name));
    const zip = await createZip(files.map(({ blob }, place) => ({ name: names[place], blob })));
    const link = element("a", { href: URL.createObjectURL(zip), download: "tegula.zip" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    show();
    parts.summary.textContent += ` ${files.length} files, ${formatBytes(zip.size)}, are in tegula.zip.`;
    if (gone.length) parts.summary.textContent += ` The server has removed ${gone.join(", ")} already.`;
  });
  button.disabled = false;
}
