// The start page: choose a picture, a scale and a preset; the page of the prediction follows.

import { call, local, upload } from "./api.js";
import { at, attempt, formatBytes } from "./dom.js";
import { signIn } from "./signing-in.js";
import { tell } from "./state.js";

const MODEL = "/v1/models/tegula/upscale";
const SCALES = [2, 4, 8];
const HINTS = {
  faithful: "Stays near the source",
  balanced: "Something in between",
  creative: "Invents detail",
  fast: "Quick",
};
const SHOWN = 8;

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

function showChoices(schema) {
  const { Input, preset } = schema.components.schemas;
  const { minimum, maximum, default: usual } = Input.properties.scale;
  const scales = SCALES.filter((scale) => scale >= minimum && scale <= maximum);
  at("scales").replaceChildren(
    ...scales.map((scale) => choice("scale", scale, `${scale}×`, scale === usual).label),
  );
  at("presets").replaceChildren(
    ...preset.enum.map((name) => {
      const radio = choice("preset", name, name, name === Input.properties.preset.default);
      radio.hint.textContent = HINTS[name] || "";
      return radio.label;
    }),
  );
}

// Show under each scale how large the result would be.
function showSizes() {
  for (const label of at("scales").children) {
    const scale = label.querySelector("input").value;
    const large = size && size.map((side) => Math.round(side * scale)).join(" × ");
    label.querySelector(".soft").textContent = large || "";
  }
}

function choose(file) {
  at("page-error").textContent = "";
  if (!file) return;
  if (file.type && !file.type.startsWith("image/")) {
    at("page-error").textContent = `${file.name} is not a picture.`;
    return;
  }
  picture = file;
  size = null;
  at("go").disabled = false;
  at("chosen").textContent = `${file.name} · ${formatBytes(file.size)}`;
  URL.revokeObjectURL(at("preview").src);
  at("preview").src = URL.createObjectURL(file);
  showSizes();
}

at("preview").addEventListener("load", () => {
  at("preview").hidden = false;
  size = [at("preview").naturalWidth, at("preview").naturalHeight];
  at("chosen").textContent += ` · ${size.join(" × ")}`;
  showSizes();
});
// Browsers cannot show every format that the server reads.
at("preview").addEventListener("error", () => (at("preview").hidden = true));

at("file").addEventListener("change", () => choose(at("file").files[0]));
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file && !at("upscale-form").hidden) choose(file);
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
  if (!at("upscale-form").hidden) choose(event.dataTransfer.files[0]);
});

async function send() {
  at("go").disabled = true;
  const file = await upload(picture, (share) => {
    at("status").textContent = `Sending the picture: ${Math.round(100 * share)} %`;
  });
  const chosen = new FormData(at("upscale-form"));
  const input = {
    image: file.urls.get,
    scale: Number(chosen.get("scale")),
    preset: chosen.get("preset"),
    prompt: at("prompt").value.trim(),
  };
  const prediction = await call("POST", `${MODEL}/predictions`, { input });
  tell("predictions");
  location.assign(local(`/p/${encodeURIComponent(prediction.id)}`));
}

at("upscale-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (await attempt(send)) return;
  at("status").textContent = "";
  at("go").disabled = false;
});

function entry(prediction) {
  const item = document.createElement("li"), link = document.createElement("a");
  link.href = local(`/p/${encodeURIComponent(prediction.id)}`);
  link.textContent = new Date(prediction.created_at).toLocaleString();
  const { scale, preset } = prediction.input;
  const kept = prediction.data_removed ? "removed" : [scale && `${scale}×`, preset].filter(Boolean).join(", ");
  item.append(link, ` ${prediction.status}${kept ? `, ${kept}` : ""}`);
  return item;
}

function open() {
  return attempt(async () => {
    await signIn();
    const [model, recent] = await Promise.all([
      call("GET", MODEL),
      call("GET", "/v1/predictions?source=web"),
    ]);
    showChoices(model.latest_version.openapi_schema);
    at("upscale-form").hidden = false;
    at("recent").hidden = recent.results.length === 0;
    at("list").replaceChildren(...recent.results.slice(0, SHOWN).map(entry));
  });
}

// A page that the browser restores from its memory still has its button disabled.
window.addEventListener("pageshow", () => {
  at("go").disabled = picture === null;
  at("status").textContent = "";
});

open();
