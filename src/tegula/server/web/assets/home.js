// The start page: a photograph, a scale, a preset, and off to the page of the prediction.

import { call } from "./api.js";
import { signIn } from "./signing-in.js";

const MODEL = "/v1/models/tegula/upscale";
const SCALES = [2, 4, 8];
const HINTS = {
  faithful: "Stays near the source",
  balanced: "Something in between",
  creative: "Invents detail",
  fast: "Quick",
};
const SHOWN = 8;

const at = (name) => document.getElementById(name);
let picture = null;
let size = null;

function choice(group, value, title, checked) {
  const label = document.createElement("label"), input = document.createElement("input");
  const hint = document.createElement("span");
  Object.assign(input, { type: "radio", name: group, value, checked });
  hint.className = "soft";
  label.append(input, title, hint);
  return { label, hint };
}

function offer(schema) {
  const { Input, preset } = schema.components.schemas;
  const { minimum, maximum, default: usual } = Input.properties.scale;
  const scales = SCALES.filter((scale) => scale >= minimum && scale <= maximum);
  at("scales").replaceChildren(
    ...scales.map((scale) => choice("scale", scale, `${scale}×`, scale === usual).label),
  );
  at("presets").replaceChildren(
    ...preset.enum.map((name) => {
      const made = choice("preset", name, name, name === Input.properties.preset.default);
      made.hint.textContent = HINTS[name] || "";
      return made.label;
    }),
  );
}

// Say how large the result would be, under each scale.
function tellSizes() {
  for (const label of at("scales").children) {
    const scale = label.querySelector("input").value;
    const large = size && size.map((side) => Math.round(side * scale)).join(" × ");
    label.querySelector(".soft").textContent = large || "";
  }
}

function spoken(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function take(file) {
  at("trouble").textContent = "";
  if (!file) return;
  if (file.type && !file.type.startsWith("image/")) {
    at("trouble").textContent = `${file.name} is no picture.`;
    return;
  }
  picture = file;
  size = null;
  at("go").disabled = false;
  at("chosen").textContent = `${file.name} · ${spoken(file.size)}`;
  URL.revokeObjectURL(at("preview").src);
  at("preview").src = URL.createObjectURL(file);
  tellSizes();
}

at("preview").addEventListener("load", () => {
  at("preview").hidden = false;
  size = [at("preview").naturalWidth, at("preview").naturalHeight];
  at("chosen").textContent += ` · ${size.join(" × ")}`;
  tellSizes();
});
// Browsers cannot show every format that the server reads.
at("preview").addEventListener("error", () => (at("preview").hidden = true));

at("file").addEventListener("change", () => take(at("file").files[0]));
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file && !at("order").hidden) take(file);
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
  if (!at("order").hidden) take(event.dataTransfer.files[0]);
});

async function send() {
  const form = new FormData();
  form.append("content", picture, picture.name);
  at("told").textContent = "Sending the picture …";
  const file = await call("POST", "/v1/files", form);
  const chosen = new FormData(at("order"));
  const input = {
    image: file.urls.get,
    scale: Number(chosen.get("scale")),
    preset: chosen.get("preset"),
    prompt: at("prompt").value.trim(),
  };
  const prediction = await call("POST", `${MODEL}/predictions`, { input });
  location.assign(`/p/${encodeURIComponent(prediction.id)}`);
}

at("order").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("trouble").textContent = "";
  at("go").disabled = true;
  try {
    await send();
  } catch (refused) {
    at("trouble").textContent = refused.message;
    at("told").textContent = "";
    at("go").disabled = false;
  }
});

function entry(prediction) {
  const item = document.createElement("li"), link = document.createElement("a");
  link.href = `/p/${encodeURIComponent(prediction.id)}`;
  link.textContent = new Date(prediction.created_at).toLocaleString();
  const { scale, preset } = prediction.input;
  const kept = prediction.data_removed ? "removed" : [scale && `${scale}×`, preset].filter(Boolean).join(", ");
  item.append(link, ` ${prediction.status}${kept ? `, ${kept}` : ""}`);
  return item;
}

async function open() {
  try {
    await signIn();
    const [model, recent] = await Promise.all([
      call("GET", MODEL),
      call("GET", "/v1/predictions?source=web"),
    ]);
    offer(model.latest_version.openapi_schema);
    at("order").hidden = false;
    at("recent").hidden = recent.results.length === 0;
    at("list").replaceChildren(...recent.results.slice(0, SHOWN).map(entry));
  } catch (refused) {
    at("trouble").textContent = refused.message;
  }
}

// A page that the browser brings back from its memory has its button still off.
window.addEventListener("pageshow", () => {
  at("go").disabled = picture === null;
  at("told").textContent = "";
});

open();
