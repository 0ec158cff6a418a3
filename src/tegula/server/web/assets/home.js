// The start page: pictures, a model and its inputs, checked before anything is sent. One picture leads
// to the page of its prediction; of several the page shows how far they are.

import { call, local } from "./api.js";
import { resumeBatch, startBatch } from "./batch.js";
import { beginChoice, chooseFiles, chosen, replacePictures, sendable, startChoosing, takePictures } from "./choosing.js";
import { KINDS, writeCode } from "./code.js";
import { byId, attempt, element, STATUS_WORDS } from "./dom.js";
import { createForm, scaleInput } from "./form.js";
import { resultSize, whyTooLarge } from "./pictures.js";
import { create, pictureOf, resultName } from "./sending.js";
import { inputsFrom } from "./settings.js";
import { signIn } from "./signing-in.js";

const USUAL_MODEL = "tegula/upscale";
const MOST_RECENT = 8;

let server = null; // what GET /v1/web/workbench says
let model = null;
let form = null;
let offered = null; // the settings of a result, for the form
let sending = null; // stops what is being sent, an AbortController

// The settings of a result that was dropped.

function offer(settings) {
  offered = settings;
  byId("offer").hidden = !settings;
  if (!settings) return;
  const asked = settings.asked || {};
  const what = Object.entries(asked).map(([name, value]) => `${name} ${value}`).join(", ");
  byId("offer-text").textContent = `${chosen.get().pictures[0].name} is a result of tegula${what ? `, made with ${what}` : ""}. Use its settings for the form?`;
}

byId("use-settings").addEventListener("click", () => {
  if (USUAL_MODEL in modelsByName()) chooseModel(USUAL_MODEL);
  const { inputs, others } = inputsFrom(offered, model);
  form.fill(inputs);
  offer(null);
  byId("status").textContent = others.length
    ? `Its settings are on the form, but for ${others.join(", ")}: only the command line has them.`
    : "Its settings are on the form.";
});
byId("leave-settings").addEventListener("click", () => offer(null));

// Drawing on the picture: masks, regions, and the crop to try settings on. Few people need all of
// that, so it is loaded when it is opened.

const paintMask = async (given) => (await import("./painting.js")).paintMask(given);
const drawRegions = async (given) => (await import("./painting.js")).drawRegions(given);
const tryOnCrop = async (given) => (await import("./crop.js")).tryOnCrop(given);

const drawnInputs = () => [...Object.keys(model.masks), "regions"].filter((name) => form.field(name));

function drawingTools() {
  const paint = Object.entries(model.masks).map(([name, keepsWhite]) => {
    const title = model.inputs.properties[name].title;
    return [name, "Paint it on the picture", () => paintMask({ picture: onlyPicture(), name, title, keepsWhite, use: (file) => change({ [name]: file }) })];
  });
  const draw = ["regions", "Draw them on the picture", () => drawRegions({ picture: onlyPicture(), text: form.field("regions").get(), use: (text) => change({ regions: text }) })];
  const all = "regions" in model.inputs.properties ? [...paint, draw] : paint;
  return Object.fromEntries(all.map(([name, textContent, open]) => {
    const button = element("button", { type: "button", className: "drawing", textContent, "data-input": name });
    button.addEventListener("click", () => attempt(open));
    return [name, button];
  }));
}

const onlyPicture = () => (chosen.get().pictures.length === 1 ? chosen.get().pictures[0] : null);

// Only one picture that the browser can show can be drawn on.
function showTools() {
  const can = Boolean(onlyPicture() && !onlyPicture().refusal && onlyPicture().url);
  for (const button of document.querySelectorAll(".drawing")) button.hidden = !can;
  byId("try").hidden = !can;
}

function change(inputs) {
  form.fill({ ...form.read(), ...inputs });
}

byId("try").addEventListener("click", () => attempt(() => tryOnCrop({
  picture: onlyPicture(),
  model,
  form,
  use(inputs) {
    change(inputs);
    byId("upscale-form").requestSubmit();
  },
})));

// The model and its inputs.

const modelsByName = () => Object.fromEntries(server.models.filter((one) => !one.obstacle).map((one) => [one.name, one]));

function showModels() {
  const names = Object.keys(modelsByName());
  byId("model").replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
  const lacking = server.models.length - names.length;
  if (lacking) byId("model-row").append(element("p", { className: "soft" }, element("a", { href: local("/catalog"), textContent: `${lacking} more models need files that this server lacks` })));
}

function chooseModel(name) {
  const changed = form ? form.fields.filter((field) => field.get() !== field.default) : [];
  const before = Object.fromEntries(changed.map((field) => [field.name, field.get()]));
  const wasOpen = byId("more")?.open;
  model = modelsByName()[name];
  byId("model").value = name;
  byId("model-about").textContent = model.description;
  form = createForm(model, { onChange: updateForm, parts: drawingTools() });
  form.fill(before); // what both models know stays
  byId("fields").replaceChildren(form.root);
  if (byId("more")) byId("more").open ||= wasOpen;
  updateForm();
  showTools();
}

byId("model").addEventListener("change", () => chooseModel(byId("model").value));

// Bring up to date what follows from pictures and inputs: what is in the way of sending them, the
// buttons, the size of the result, and the code.
function updateForm() {
  if (!form) return;
  const inputs = form.read();
  const { pictures, reading } = chosen.get();
  const refused = pictures.filter((picture) => picture.refusal);
  const large = sendable().map((picture) => whyTooLarge(picture, model, inputs, server)).filter(Boolean);
  const [first] = large;
  const many = pictures.length > 1;
  let text = first ? first.sentence : "";
  if (!text && refused.length && !many) text = refused[0].refusal;
  if (!text && refused.length) text = `${refused.length} of ${pictures.length} files will be left out.`;
  byId("problem").textContent = text;
  byId("fit").hidden = !first?.fitting;
  if (first?.fitting) {
    byId("fit").textContent = first.fitting.label;
    byId("fit").onclick = () => {
      // Of several pictures each must fit.
      const fits = large.map((one) => one.fitting).filter(Boolean).map((one) => one.inputs);
      const scale = scaleInput(model);
      const least = Math.min(...fits.map((one) => one[scale] ?? Infinity));
      change({ ...fits[0], ...(Number.isFinite(least) ? { [scale]: least } : {}) });
    };
  }
  byId("go").disabled = !sendable().length || large.length > 0 || reading || sending !== null;
  byId("go").textContent = sendable().length > 1 ? `Make ${sendable().length} pictures larger` : "Make it larger";
  const size = sendable().length === 1 ? resultSize(model, inputs, sendable()[0]) : null;
  byId("result-size").textContent = size ? `The result has ${size.join(" × ")} pixels.` : "";
  showCode(inputs);
}

// Code.

function showCode(inputs) {
  const [one] = sendable();
  const image = one?.address || new File([], one?.name || "photo.jpg");
  const all = { [model.image]: image, ...inputs };
  const kind = byId("code-kinds").querySelector(":checked").value;
  const { text, note } = writeCode(kind, { model: model.name, inputs: all, hasTokens: server.has_tokens, result: resultName(image.name || "photo.jpg", model, inputs) });
  byId("code-text").textContent = text;
  byId("code-note").textContent = note;
}

for (const [value, { label }] of Object.entries(KINDS)) {
  const radio = element("input", { type: "radio", name: "code-kind", value, checked: value === "curl" });
  byId("code-kinds").append(element("label", {}, radio, label));
}
byId("code-kinds").addEventListener("change", (event) => {
  event.stopPropagation();
  updateForm();
});
byId("copy-code").addEventListener("click", async () => {
  // Browsers offer the clipboard only to pages over TLS and to those of this machine.
  if (navigator.clipboard) await navigator.clipboard.writeText(byId("code-text").textContent).catch(() => {});
  else {
    getSelection().selectAllChildren(byId("code-text"));
    document.execCommand("copy");
  }
  byId("copy-code").textContent = "Copied";
});

// Sending.

byId("upscale-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (byId("go").disabled) return;
  byId("go").disabled = true;
  const inputs = form.read();
  const sent = sendable();
  if (sent.length > 1) {
    startBatch(model, sent, inputs);
    replacePictures([]);
    return;
  }
  attempt(() => sendOne(model, sent[0], inputs));
});

async function sendOne(chosen, picture, inputs) {
  if (sending) return;
  sending = new AbortController();
  const { signal } = sending;
  byId("stop").hidden = false;
  updateForm();
  const say = (text) => (byId("status").textContent = text);
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
    byId("go").focus();
  } finally {
    byId("stop").hidden = true;
  }
}

byId("stop").addEventListener("click", () => sending?.abort());

// Coming back from a prediction: `again` fills the form with its picture and inputs, `from` takes its
// result as the picture.
async function comeBack() {
  const query = new URLSearchParams(location.search);
  const id = query.get("again") || query.get("from");
  if (!id) return;
  const isLast = beginChoice(); // somebody may choose another picture meanwhile
  const prediction = await call("GET", `/v1/predictions/${encodeURIComponent(id)}`);
  if (!(prediction.model in modelsByName())) throw new Error(`${prediction.model} cannot run here any more; choose another model.`);
  chooseModel(prediction.model);
  if (prediction.data_removed) throw new Error("The picture and inputs of that prediction have been removed; choose the picture again.");
  if (query.has("again")) {
    const name = prediction.input[model.image].split("/").pop();
    const source = await pictureOf(`/v1/predictions/${encodeURIComponent(id)}/source`, name);
    if (isLast()) {
      await chooseFiles([source]);
      offer(null);
    }
    form.fill(prediction.input);
  } else {
    const [output] = [prediction.output].flat();
    if (!output) throw new Error("That prediction has no result; choose a picture.");
    const result = await pictureOf(output, "result", prediction.urls);
    if (isLast()) await chooseFiles([result]);
  }
  history.replaceState(null, "", location.pathname);
}

function entry({ id, name, model: modelName, created_at: createdAt, status, chosen, data_removed: removed }) {
  const link = element("a", { href: local(`/p/${encodeURIComponent(id)}`), textContent: name || modelName });
  const { scale, preset } = chosen;
  const words = [new Date(createdAt).toLocaleString(), STATUS_WORDS[status]?.toLowerCase(), ...(removed ? ["removed"] : [scale && `${scale}×`, preset])];
  return element("li", {}, link, ` ${words.filter(Boolean).join(", ")}`);
}

startChoosing({
  onReplace(before) {
    // What was painted on the picture before says nothing of this one.
    if (before.length) for (const name of drawnInputs()) form.field(name).set(undefined);
    if (!sending) byId("status").textContent = "";
  },
  onSettings: offer,
});
chosen.watch(() => {
  updateForm();
  showTools();
});

attempt(async () => {
  await signIn();
  const [about, recent] = await Promise.all([call("GET", "/v1/web/workbench"), call("GET", "/v1/web/history?source=web&removed=true")]);
  server = about;
  showModels();
  const names = Object.keys(modelsByName());
  if (!names.length) throw new Error("No model can run on this server; the page Models says what they lack.");
  const wanted = new URLSearchParams(location.search).get("model");
  chooseModel(names.includes(wanted) ? wanted : names.includes(USUAL_MODEL) ? USUAL_MODEL : names[0]);
  takePictures(server);
  byId("upscale-form").hidden = false;
  byId("recent").hidden = recent.results.length === 0;
  byId("list").replaceChildren(...recent.results.slice(0, MOST_RECENT).map(entry));
  resumeBatch(server);
  await comeBack();
});

// A page that the browser restores from its memory still has its button disabled.
window.addEventListener("pageshow", () => {
  sending = null;
  byId("status").textContent = "";
  updateForm();
});
