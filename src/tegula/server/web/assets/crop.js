// Trying settings on a part of the picture: a rectangle is drawn, and a grid of presets, or of the
// values of two inputs, is made of it. A cell that is clicked becomes the settings of the whole.

import { call } from "./api.js";
import { element, isActive } from "./dom.js";
import { boxOver } from "./painting.js";
import { create, pictureOf } from "./sending.js";

const USUAL_SIDE = 192;
const LARGEST_SIDE = 512;
const POLL_MS = 700;
const MOST_SUGGESTED = 3;

// Show the dialog for a picture. `use(inputs)` is called with the settings of the cell that was chosen.
export function tryOnCrop({ picture, model, form, use }) {
  const dialog = element("dialog", { className: "tool", "aria-labelledby": "try-title" });
  const title = element("h2", { id: "try-title", textContent: "Try on a crop" });
  const help = element("p", { className: "soft", textContent: "Draw a rectangle on the picture, or move it by the arrow keys and size it with Shift. Smaller is quicker." });
  const box = boxOver(picture, { side: USUAL_SIDE, most: LARGEST_SIDE, label: "Crop" });
  const choice = comparison(model, form);
  const go = element("button", { type: "button", id: "try-go", className: "main", textContent: "Make the grid" });
  const close = element("button", { type: "button", id: "try-close", textContent: "Close" });
  const summary = element("p", { id: "try-status", role: "status", className: "soft" });
  const error = element("p", { id: "try-error", role: "alert", className: "error" });
  const grid = element("div", { id: "grid", className: "grid" });
  const stop = new AbortController();
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    stop.abort();
    dialog.remove();
  });
  go.addEventListener("click", async () => {
    go.disabled = true;
    error.textContent = "";
    try {
      const variants = choice.variants(); // before the picture is sent
      await fill({ grid, summary, variants, crop: await cut(picture, box.get()), model, form, stop: stop.signal, use: (inputs) => {
        dialog.close();
        use(inputs);
      } });
    } catch (fault) {
      if (!stop.signal.aborted) error.textContent = fault.message;
    }
    go.disabled = false;
  });
  dialog.append(title, help, box.root, choice.root, element("div", { className: "row" }, go, close), error, summary, grid);
  document.body.append(dialog);
  dialog.showModal();
  box.focus();
}

// What the cells differ in: the presets, or up to three values of one or two inputs.
function comparison(model, form) {
  const numbers = form.fields.filter(({ schema, name }) => ["number", "integer"].includes(schema.type) && !model.choices[name] && name !== "seed");
  const choices = form.fields.filter(({ name }) => model.choices[name]);
  const names = [...numbers, ...choices].map(({ name }) => name);
  const hasPresets = "preset" in model.choices;
  const first = chooser("First", "try-1", names.includes("creativity") ? "creativity" : names[0]);
  const second = chooser("Second", "try-2", names.includes("resemblance") ? "resemblance" : "");
  const kind = element("select", { id: "try-kind" }, hasPresets ? element("option", { value: "presets", textContent: "All presets" }) : null, element("option", { value: "settings", textContent: "One or two settings" }));
  const table = element("div", { className: "row", hidden: hasPresets }, first.root, second.root);
  kind.addEventListener("change", () => (table.hidden = kind.value !== "settings"));

  function chooser(words, id, usual) {
    const blank = element("option", { value: "", textContent: "none" });
    const select = element("select", { id }, ...(id === "try-2" ? [blank] : []), ...names.map((name) => element("option", { value: name, textContent: name })));
    const values = element("input", { id: `${id}-values`, type: "text" });
    const suggest = () => (values.value = suggested(select.value).join(", "));
    select.value = usual;
    select.addEventListener("change", suggest);
    suggest();
    return { select, values, root: element("div", { className: "row" }, element("label", {}, `${words} `, select), element("label", {}, "Values ", values)) };
  }

  function suggested(name) {
    if (!name) return [];
    if (model.choices[name]) return model.choices[name].slice(0, MOST_SUGGESTED);
    const { minimum: low = 0, maximum, type } = model.inputs.properties[name];
    const high = Math.min(maximum ?? 1, low + 100);
    const round = (value) => (type === "integer" ? Math.round(value) : Number(value.toFixed(2)));
    return [...new Set([0.2, 0.5, 0.8].map((share) => round(low + share * (high - low))))];
  }

  function read({ select, values }) {
    const name = select.value;
    if (!name) return [{}];
    const { minimum = -Infinity, maximum = Infinity } = model.inputs.properties[name];
    const given = values.value.split(",").map((one) => one.trim()).filter(Boolean).slice(0, 6);
    if (!given.length) throw new Error(`Write the values of ${name} with commas between, such as ${suggested(name).join(", ")}.`);
    return given.map((text) => {
      const all = model.choices[name];
      const value = all ? all.find((one) => String(one) === text) : Number(text);
      if (value === undefined) throw new Error(`${name} is one of ${all.join(", ")}, not ${text}.`);
      if (!all && !(value >= minimum && value <= maximum)) throw new Error(`${name} lies between ${minimum} and ${maximum}; ${text} does not.`);
      return { [name]: value };
    });
  }

  return {
    root: element("div", {}, element("label", {}, "Compare ", kind), table),
    variants() {
      if (kind.value === "presets") return model.choices.preset.map((preset) => ({ preset }));
      return read(first).flatMap((one) => read(second).map((other) => ({ ...one, ...other })));
    },
  };
}

async function cut(picture, { x, y, width, height }) {
  const image = element("img", { src: picture.url });
  await image.decode();
  const canvas = element("canvas", { width, height });
  canvas.getContext("2d").drawImage(image, x, y, width, height, 0, 0, width, height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new File([blob], "crop.png", { type: "image/png" });
}

async function fill({ grid, summary, variants, crop, model, form, stop, use }) {
  const common = form.read();
  // Only what is compared may differ, and a mask is of the whole picture.
  for (const name of Object.keys(model.masks)) delete common[name];
  if ("seed" in model.inputs.properties) common.seed ??= 1;
  delete common.regions;
  const cells = variants.map((change) => cell(change, () => use(change)));
  grid.replaceChildren(...cells.map(({ root }) => root));
  summary.textContent = `0 of ${cells.length} done.`;
  let done = 0, source = { name: crop.name, file: crop };
  stop.addEventListener("abort", () => {
    for (const { prediction } of cells) if (prediction) call("POST", `/v1/predictions/${prediction.id}/cancel`).catch(() => {});
  });
  for (const one of cells) {
    one.prediction = await create(model, source, { ...common, ...one.change }, () => {}, stop);
    source = { ...source, address: one.prediction.input[model.image] }; // it is sent once
    one.show("Waiting");
    if (stop.aborted) return;
  }
  for (const { prediction, show, draw } of cells) {
    let now = prediction;
    while (isActive(now)) {
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      if (stop.aborted) return;
      now = await call("GET", `/v1/predictions/${prediction.id}`);
      if (now.status === "processing") show("Running");
    }
    const [output] = [now.output].flat();
    if (now.status === "succeeded" && output) draw(URL.createObjectURL(await pictureOf(output, "cell", now.urls)));
    else show(now.error || now.status);
    summary.textContent = `${++done} of ${cells.length} done${done === cells.length ? "; choose one to make the whole like it" : ""}.`;
  }
}

function cell(change, choose) {
  const words = Object.entries(change).map(([name, value]) => `${name} ${value}`).join(", ");
  const state = element("span", { className: "soft", textContent: "Sending" });
  const button = element("button", { type: "button", className: "cell", disabled: true }, state, element("span", { textContent: words }));
  button.addEventListener("click", choose);
  return {
    change,
    root: button,
    show: (text) => (state.textContent = text),
    draw(url) {
      state.replaceWith(element("img", { src: url, alt: "" }));
      button.disabled = false;
    },
  };
}
