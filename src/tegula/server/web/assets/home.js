// The start page: pictures, a model and its inputs, checked before anything is sent. One picture leads
// to the page of its prediction; of several the page shows how far they are.

import { call, local } from "./api.js";
import { resumeBatch, startBatch } from "./batch.js";
import { KINDS, writeCode } from "./code.js";
import { at, attempt, element, formatBytes, showError, STATUS_WORDS } from "./dom.js";
import { createForm, scaleInput } from "./form.js";
import { openAddress, openFile, openTransfer, resultSize, whyNotTaken, whyTooLarge } from "./pictures.js";
import { create, pictureOf, resultName } from "./sending.js";
import { inputsFrom, readSettings } from "./settings.js";
import { signIn } from "./signing-in.js";

const USUAL_MODEL = "tegula/upscale";
const MOST_RECENT = 8;
const MOST_PICTURES = 1000;

let server = null; // what GET /v1/web/workbench says
let model = null;
let form = null;
let pictures = [];
let offered = null;
let loaded = () => {};
const ready = new Promise((resolve) => (loaded = resolve)); // once the server has said what it takes
let sending = null; // stops what is being sent, an AbortController
let opening = 0; // how many times pictures were chosen, so that the last choice wins
let reading = false; // while the last choice is read; nothing is sent until then

// Pictures.

const takes = () => !at("upscale-form").hidden;

async function chooseFiles(files) {
  showError("");
  if (files.length > MOST_PICTURES) {
    showError(`You chose ${files.length} files; choose up to ${MOST_PICTURES} at a time.`);
    return;
  }
  const turn = ++opening;
  reading = true;
  updateForm();
  await ready;
  const opened = [];
  for (const file of files) opened.push(await openFile(file));
  if (turn !== opening) return;
  reading = false;
  // Files that are no pictures stay on the list with the reason, and are left out of what is sent.
  const taken = opened.map((picture) => ({ ...picture, refusal: whyNotTaken(picture, server) }));
  choose(taken);
  const settings = taken.length === 1 && !taken[0].refusal ? await readSettings(taken[0].file) : null;
  if (turn === opening) offer(settings);
}

function chooseAddress(text) {
  attempt(async () => {
    if (text.startsWith("data:image/")) {
      const blob = await pictureOf(text, "dropped");
      return chooseFiles([blob]);
    }
    const picture = openAddress(text), turn = ++opening;
    await ready;
    if (turn !== opening) return;
    reading = false;
    choose([{ ...picture, refusal: "" }]);
    offer(null);
  });
}

function choose(chosen) {
  // What was painted on the picture before says nothing of this one.
  if (pictures.length) for (const name of drawnInputs()) form.field(name).set(undefined);
  for (const { url } of pictures) if (url) URL.revokeObjectURL(url);
  pictures = chosen;
  if (!sending) at("status").textContent = "";
  showPictures();
  updateForm();
  showTools();
}

function describe({ name, file, width, height, kind, address }) {
  const size = width ? `${width} × ${height}` : "";
  const what = address ? "fetched by the server" : [kind === "HEIC" && "no preview", formatBytes(file.size)].filter(Boolean).join(" · ");
  return [name, size, what].filter(Boolean).join(" · ");
}

function showPictures() {
  const [one] = pictures;
  const single = pictures.length === 1;
  at("preview").hidden = !single || !one.url;
  if (single && one.url) at("preview").src = one.url;
  at("chosen").textContent = single ? describe(one) : `${pictures.length} pictures`;
  if (!pictures.length) at("chosen").replaceChildren(element("strong", { textContent: "Drop photographs or a folder here" }), ", paste one, or choose files");
  at("pictures").hidden = pictures.length < 2;
  at("pictures").replaceChildren(...(single ? [] : pictures.map(line)));
}

function line(picture) {
  const remove = element("button", { type: "button", textContent: "Remove", "aria-label": `Remove ${picture.name}` });
  remove.addEventListener("click", () => {
    pictures = pictures.filter((other) => other !== picture);
    showPictures();
    updateForm();
    showTools();
  });
  const fault = picture.refusal && element("span", { className: "error", textContent: picture.refusal });
  return element("li", { className: "row" }, element("span", { className: "grow" }, picture.refusal ? fault : describe(picture)), remove);
}

// The settings of a result that was dropped.

function offer(settings) {
  offered = settings;
  at("offer").hidden = !settings;
  if (!settings) return;
  const asked = settings.asked || {};
  const what = Object.entries(asked).map(([name, value]) => `${name} ${value}`).join(", ");
  at("offer-text").textContent = `${pictures[0].name} is a result of tegula${what ? `, made with ${what}` : ""}. Use its settings for the form?`;
}

at("use-settings").addEventListener("click", () => {
  if (USUAL_MODEL in modelsByName()) chooseModel(USUAL_MODEL);
  const { inputs, others } = inputsFrom(offered, model);
  form.fill(inputs);
  offer(null);
  at("status").textContent = others.length
    ? `Its settings are on the form, but for ${others.join(", ")}: only the command line has them.`
    : "Its settings are on the form.";
});
at("leave-settings").addEventListener("click", () => offer(null));

// Drawing on the picture: masks, regions, and the crop to try settings on. Few people need all of
// that, so it is loaded when it is opened.

const paintMask = async (given) => (await import("./painting.js")).paintMask(given);
const drawRegions = async (given) => (await import("./painting.js")).drawRegions(given);
const tryOnCrop = async (given) => (await import("./crop.js")).tryOnCrop(given);

const drawnInputs = () => [...Object.keys(model.masks), "regions"].filter((name) => form.field(name));

function drawingTools() {
  const paint = Object.entries(model.masks).map(([name, keepsWhite]) => {
    const title = model.inputs.properties[name].title;
    return [name, "Paint it on the picture", () => paintMask({ picture: pictures[0], name, title, keepsWhite, use: (file) => change({ [name]: file }) })];
  });
  const draw = ["regions", "Draw them on the picture", () => drawRegions({ picture: pictures[0], text: form.field("regions").get(), use: (text) => change({ regions: text }) })];
  const all = "regions" in model.inputs.properties ? [...paint, draw] : paint;
  return Object.fromEntries(all.map(([name, textContent, open]) => {
    const button = element("button", { type: "button", className: "drawing", textContent, "data-input": name });
    button.addEventListener("click", () => attempt(open));
    return [name, button];
  }));
}

// Only one picture that the browser can show can be drawn on.
function showTools() {
  const can = pictures.length === 1 && !pictures[0].refusal && Boolean(pictures[0].url);
  for (const button of document.querySelectorAll(".drawing")) button.hidden = !can;
  at("try").hidden = !can;
}

function change(inputs) {
  form.fill({ ...form.read(), ...inputs });
}

at("try").addEventListener("click", () => attempt(() => tryOnCrop({
  picture: pictures[0],
  model,
  form,
  use(inputs) {
    change(inputs);
    at("upscale-form").requestSubmit();
  },
})));

// The model and its inputs.

const modelsByName = () => Object.fromEntries(server.models.filter((one) => !one.obstacle).map((one) => [one.name, one]));

function showModels() {
  const names = Object.keys(modelsByName());
  at("model").replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
  const lacking = server.models.length - names.length;
  if (lacking) at("model-row").append(element("p", { className: "soft" }, element("a", { href: local("/catalog"), textContent: `${lacking} more models need files that this server lacks` })));
}

function chooseModel(name) {
  const changed = form ? form.fields.filter((field) => field.get() !== field.default) : [];
  const before = Object.fromEntries(changed.map((field) => [field.name, field.get()]));
  const wasOpen = at("more")?.open;
  model = modelsByName()[name];
  at("model").value = name;
  at("model-about").textContent = model.description;
  form = createForm(model, { onChange: updateForm, parts: drawingTools() });
  form.fill(before); // what both models know stays
  at("fields").replaceChildren(form.root);
  if (at("more")) at("more").open ||= wasOpen;
  updateForm();
  showTools();
}

at("model").addEventListener("change", () => chooseModel(at("model").value));

const sendable = () => pictures.filter((picture) => !picture.refusal);

// Bring up to date what follows from pictures and inputs: what is in the way of sending them, the
// buttons, the size of the result, and the code.
function updateForm() {
  if (!form) return;
  const inputs = form.read();
  const refused = pictures.filter((picture) => picture.refusal);
  const large = sendable().map((picture) => whyTooLarge(picture, model, inputs, server)).filter(Boolean);
  const [first] = large;
  const many = pictures.length > 1;
  let text = first ? first.sentence : "";
  if (!text && refused.length && !many) text = refused[0].refusal;
  if (!text && refused.length) text = `${refused.length} of ${pictures.length} files will be left out.`;
  at("problem").textContent = text;
  at("fit").hidden = !first?.fitting;
  if (first?.fitting) {
    at("fit").textContent = first.fitting.label;
    at("fit").onclick = () => {
      // Of several pictures each must fit.
      const fits = large.map((one) => one.fitting).filter(Boolean).map((one) => one.inputs);
      const scale = scaleInput(model);
      const least = Math.min(...fits.map((one) => one[scale] ?? Infinity));
      change({ ...fits[0], ...(Number.isFinite(least) ? { [scale]: least } : {}) });
    };
  }
  at("go").disabled = !sendable().length || large.length > 0 || reading || sending !== null;
  at("go").textContent = sendable().length > 1 ? `Make ${sendable().length} pictures larger` : "Make it larger";
  const size = sendable().length === 1 ? resultSize(model, inputs, sendable()[0]) : null;
  at("result-size").textContent = size ? `The result has ${size.join(" × ")} pixels.` : "";
  showCode(inputs);
}

// Code.

function showCode(inputs) {
  const [one] = sendable();
  const image = one?.address || new File([], one?.name || "photo.jpg");
  const all = { [model.image]: image, ...inputs };
  const kind = at("code-kinds").querySelector(":checked").value;
  const { text, note } = writeCode(kind, { model: model.name, inputs: all, hasTokens: server.has_tokens, result: resultName(image.name || "photo.jpg", model, inputs) });
  at("code-text").textContent = text;
  at("code-note").textContent = note;
}

for (const [value, { label }] of Object.entries(KINDS)) {
  const radio = element("input", { type: "radio", name: "code-kind", value, checked: value === "curl" });
  at("code-kinds").append(element("label", {}, radio, label));
}
at("code-kinds").addEventListener("change", (event) => {
  event.stopPropagation();
  updateForm();
});
at("copy-code").addEventListener("click", async () => {
  // Browsers offer the clipboard only to pages over TLS and to those of this machine.
  if (navigator.clipboard) await navigator.clipboard.writeText(at("code-text").textContent).catch(() => {});
  else {
    getSelection().selectAllChildren(at("code-text"));
    document.execCommand("copy");
  }
  at("copy-code").textContent = "Copied";
});

// What people drop, paste and choose.

at("file").addEventListener("change", () => at("file").files.length && chooseFiles([...at("file").files]));
at("choose-folder").addEventListener("click", () => at("folder").click());
at("folder").addEventListener("change", () => {
  const files = [...at("folder").files].filter((file) => !file.name.startsWith("."));
  if (files.length) chooseFiles(files);
});
at("take-address").addEventListener("click", () => chooseAddress(at("address").value.trim()));
at("address").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  chooseAddress(at("address").value.trim());
});

async function takeTransfer(transfer, what) {
  const { files, address } = await openTransfer(transfer);
  if (files.length) await chooseFiles(files);
  else if (address && (what === "dropped" || /^(https?:\/\/\S+|data:image\/\S+)$/.test(address))) chooseAddress(address);
  else if (what === "dropped") showError("What you dropped is neither a file nor an address; drop a picture, or choose one.");
}

document.addEventListener("paste", (event) => {
  const isWriting = event.target.matches?.("input, textarea") && !event.clipboardData.files.length;
  if (takes() && !isWriting) attempt(() => takeTransfer(event.clipboardData, "pasted"));
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  at("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  if (takes()) attempt(() => takeTransfer(event.dataTransfer, "dropped"));
});

// Sending.

at("upscale-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (at("go").disabled) return;
  at("go").disabled = true;
  const inputs = form.read();
  const sent = sendable();
  if (sent.length > 1) {
    startBatch(model, sent, inputs);
    choose([]);
    return;
  }
  attempt(() => sendOne(model, sent[0], inputs));
});

async function sendOne(chosen, picture, inputs) {
  if (sending) return;
  sending = new AbortController();
  const { signal } = sending;
  at("stop").hidden = false;
  updateForm();
  const say = (text) => (at("status").textContent = text);
  try {
    const prediction = await create(chosen, picture, inputs, say, signal);
    const id = encodeURIComponent(prediction.id);
    history.replaceState(null, "", local(`/?again=${id}`)); // the way back leads to what was chosen
    location.assign(local(`/p/${id}`));
  } catch (error) {
    sending = null;
    say(signal.aborted ? "Stopped; no prediction was made." : "");
    updateForm();
    if (!signal.aborted) throw error;
    at("go").focus();
  } finally {
    at("stop").hidden = true;
  }
}

at("stop").addEventListener("click", () => sending?.abort());

// Coming back from a prediction: `again` fills the form with its picture and inputs, `from` takes its
// result as the picture.
async function comeBack() {
  const query = new URLSearchParams(location.search);
  const id = query.get("again") || query.get("from");
  if (!id) return;
  const turn = ++opening; // somebody may choose another picture meanwhile
  const prediction = await call("GET", `/v1/predictions/${encodeURIComponent(id)}`);
  if (!(prediction.model in modelsByName())) throw new Error(`${prediction.model} cannot run here any more; choose another model.`);
  chooseModel(prediction.model);
  if (prediction.data_removed) throw new Error("The picture and inputs of that prediction have been removed; choose the picture again.");
  if (query.has("again")) {
    const name = prediction.input[model.image].split("/").pop();
    const source = await pictureOf(`/v1/predictions/${encodeURIComponent(id)}/source`, name);
    if (turn === opening) {
      await chooseFiles([source]);
      offer(null);
    }
    form.fill(prediction.input);
  } else {
    const [output] = [prediction.output].flat();
    if (!output) throw new Error("That prediction has no result; choose a picture.");
    const result = await pictureOf(output, "result", prediction.urls);
    if (turn === opening) await chooseFiles([result]);
  }
  history.replaceState(null, "", location.pathname);
}

function entry({ id, name, model: modelName, created_at: createdAt, status, chosen, data_removed: removed }) {
  const link = element("a", { href: local(`/p/${encodeURIComponent(id)}`), textContent: name || modelName });
  const { scale, preset } = chosen;
  const words = [new Date(createdAt).toLocaleString(), STATUS_WORDS[status]?.toLowerCase(), ...(removed ? ["removed"] : [scale && `${scale}×`, preset])];
  return element("li", {}, link, ` ${words.filter(Boolean).join(", ")}`);
}

attempt(async () => {
  await signIn();
  const [about, recent] = await Promise.all([call("GET", "/v1/web/workbench"), call("GET", "/v1/web/history?source=web&removed=true")]);
  server = about;
  showModels();
  const names = Object.keys(modelsByName());
  if (!names.length) throw new Error("No model can run on this server; the page Models says what they lack.");
  const wanted = new URLSearchParams(location.search).get("model");
  chooseModel(names.includes(wanted) ? wanted : names.includes(USUAL_MODEL) ? USUAL_MODEL : names[0]);
  loaded();
  at("upscale-form").hidden = false;
  at("recent").hidden = recent.results.length === 0;
  at("list").replaceChildren(...recent.results.slice(0, MOST_RECENT).map(entry));
  resumeBatch(server);
  await comeBack();
});

// A page that the browser restores from its memory still has its button disabled.
window.addEventListener("pageshow", () => {
  sending = null;
  at("status").textContent = "";
  updateForm();
});
