// A form for the inputs of a model, made from its schema: a control for each, the everyday ones open
// and the others under "More settings", with what the schema says of them.

import { element } from "./dom.js";

// What most people set, in whatever model. Everything else is under "More settings".
const EVERYDAY = new Set([
  "scale", "scale_factor", "upscale_by", "upscale", "resolution", "preset", "prompt", "positive_prompt",
  "creativity", "denoise", "resemblance", "task_type", "version", "face_enhance",
  "codeformer_fidelity", "format", "output_format",
]);
const SCALES = ["scale", "scale_factor", "upscale_by", "upscale"];
const MOST_RADIOS = 5;
const LONGEST_RADIO = 14;
const QUICK_SCALES = [2, 4, 8];

// The input that says how many times as large the result is, if the model has one.
export function scaleInput(model) {
  return SCALES.find((name) => name in model.inputs.properties) || null;
}

// `parts`: elements to put after a control, by the name of its input. In what is returned `read()`
// gives the inputs, without the picture; `fill(inputs)` sets all controls, those not named to their
// defaults; `fields` are what is offered, each {name, title, schema, default, get, set}.
export function createForm(model, { onChange = () => {}, parts = {} } = {}) {
  const fields = Object.entries(model.inputs.properties)
    .filter(([name]) => name !== model.image)
    .sort(([, one], [, other]) => one["x-order"] - other["x-order"])
    .map(([name, schema]) => makeField(model, name, schema, parts[name]));
  const refused = (field) => field.fidelity === "refused";
  const offered = fields.filter((field) => !refused(field));
  const open = offered.filter((field) => EVERYDAY.has(field.name));
  const more = offered.filter((field) => !EVERYDAY.has(field.name));
  const reset = element("button", { type: "button", textContent: "Back to the defaults" });
  const rest = element(
    "details",
    { id: "more" },
    element("summary", { textContent: `More settings (${more.length})` }),
    element("div", { className: "fields" }, ...more.map((field) => field.root)),
    withoutEffect(fields.filter(refused)),
    reset,
  );
  const root = element(
    "div",
    {},
    element("div", { className: "fields" }, ...open.map((field) => field.root)),
    more.length ? rest : null,
  );
  root.addEventListener("input", onChange);
  reset.addEventListener("click", () => {
    for (const field of offered) field.set(undefined);
    onChange();
  });
  // A control that is wrong must be seen when the browser says so.
  root.addEventListener("invalid", (event) => rest.contains(event.target) && (rest.open = true), true);

  return {
    root,
    fields: offered,
    field: (name) => offered.find((field) => field.name === name),
    read() {
      const values = offered.map((field) => [field.name, field.get(), field]);
      const wanted = ([name, value, field]) =>
        value !== undefined && (EVERYDAY.has(name) || value !== field.default);
      return Object.fromEntries(values.filter(wanted).map(([name, value]) => [name, value]));
    },
    fill(inputs) {
      for (const field of offered) field.set(inputs[field.name]);
      const changed = more.some((field) => inputs[field.name] !== undefined && field.get() !== field.default);
      rest.open = rest.open || changed;
      onChange();
    },
  };
}

function withoutEffect(fields) {
  if (!fields.length) return null;
  const lines = fields.map(({ name, remark }) =>
    element("li", {}, element("code", { textContent: name }), `: ${remark}`),
  );
  return element("div", { className: "soft" }, "Without effect here:", element("ul", {}, ...lines));
}

// A field is {name, root, default, fidelity, remark, get, set}; `get` gives undefined for what is left open.
function makeField(model, name, schema, part) {
  const remark = model.remarks[name] || { fidelity: "exact", remark: "" };
  const about = { name, id: `field-${name}`, title: schema.title || title(name), schema, model };
  const makeControl = schema.format === "uri" ? fileField
    : model.choices[name] ? choiceField
    : schema.type === "boolean" ? switchField
    : schema.type === "number" || schema.type === "integer" ? numberField
    : textField;
  const hint = [schema.description, sentence(remark.remark)].filter(Boolean).join(" ");
  const help = element("p", { id: `help-${name}`, className: "soft help", textContent: hint });
  const control = makeControl(about, help);
  control.root.classList.add("field-box");
  control.root.append(help, ...(part ? [part] : []));
  return { name, default: schema.default, title: about.title, schema, ...remark, ...control };
}

function title(name) {
  const words = name.replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
}

function sentence(text) {
  return text ? `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}` : "";
}

function label({ id, title: text }) {
  return element("label", { className: "field", htmlFor: id, textContent: text });
}

function described(control, help) {
  control.setAttribute("aria-describedby", help.id);
  return control;
}

function textField(about, help) {
  const { id, name, schema } = about;
  const isLong = name.includes("prompt") || name.includes("regions");
  const control = element(isLong ? "textarea" : "input", { id, name, rows: 2, value: schema.default ?? "" });
  // An optional text without a default is left out when empty, and so falls to the model.
  const empty = schema.default === undefined ? undefined : "";
  return {
    root: element("div", { className: isLong ? "wide" : "" }, label(about), described(control, help)),
    get: () => control.value.trim() || empty,
    set: (value) => (control.value = value ?? schema.default ?? ""),
  };
}

function switchField(about, help) {
  const { id, name, schema } = about;
  const control = element("input", { id, name, type: "checkbox", checked: Boolean(schema.default) });
  const words = element("label", { htmlFor: id, className: "switch" }, described(control, help), ` ${about.title}`);
  return {
    root: element("div", {}, words),
    get: () => control.checked,
    set: (value) => (control.checked = Boolean(value ?? schema.default)),
  };
}

function choiceField(about, help) {
  const { id, name, schema, model } = about;
  const all = model.choices[name];
  const known = (value) => (all.includes(value) ? value : schema.default); // another model may have others
  const short = all.length <= MOST_RADIOS && all.every((one) => String(one).length <= LONGEST_RADIO);
  const found = (text) => all.find((one) => String(one) === text);
  if (!short || schema.default === undefined) {
    const blank = schema.default === undefined ? [element("option", { value: "", textContent: "Left open" })] : [];
    const options = all.map((one) => element("option", { value: one, textContent: one }));
    const control = element("select", { id, name }, ...blank, ...options);
    const set = (value) => (control.value = String(known(value) ?? ""));
    set(undefined);
    return {
      root: element("div", {}, label(about), described(control, help)),
      get: () => found(control.value),
      set,
    };
  }
  const radios = all.map((value) => element("input", { type: "radio", name, value, checked: value === schema.default }));
  const labels = radios.map((radio) => element("label", {}, radio, radio.value));
  const set = (value) => {
    for (const radio of radios) radio.checked = radio.value === String(known(value));
  };
  const legend = element("legend", { textContent: about.title });
  const box = element("fieldset", { className: "wide" }, legend, element("div", { className: "choices" }, ...labels));
  return {
    root: described(box, help),
    get: () => found(radios.find((radio) => radio.checked)?.value),
    set,
  };
}

function numberField(about, help) {
  const { id, name, schema, model } = about;
  const isWhole = schema.type === "integer";
  const low = schema.minimum, high = Math.min(schema.maximum ?? Infinity, Number.MAX_SAFE_INTEGER);
  const bounds = { min: low ?? "", max: Number.isFinite(high) ? high : "" };
  const control = element("input", { id, name, type: "number", step: isWhole ? 1 : "any", ...bounds });
  control.placeholder = schema.default === undefined ? "left open" : "";
  const row = element("div", { className: "row number" }, described(control, help));
  const set = (value) => {
    control.value = value ?? schema.default ?? "";
    control.dispatchEvent(new Event("set"));
  };
  if (schema.default !== undefined && high - low <= 1000) row.append(slider(about, control, low, high, isWhole));
  set(undefined);
  const box = element("div", {}, label(about), row);
  if (name === scaleInput(model)) box.append(quickScales(control, low, high));
  return {
    root: box,
    get: () => (control.value === "" ? schema.default : Number(control.value)),
    set,
    control,
  };
}

// The slider moves the number and follows it; it is the number that counts.
function slider(about, control, low, high, isWhole) {
  const coarse = 10 ** Math.floor(Math.log10((high - low) / 20));
  const range = element("input", { type: "range", min: low, max: high, step: isWhole ? 1 : coarse });
  range.setAttribute("aria-label", `${about.title}, by a slider`);
  const follow = () => (range.value = control.value === "" ? about.schema.default : control.value);
  range.addEventListener("input", () => (control.value = Number(range.value)));
  for (const event of ["input", "set"]) control.addEventListener(event, follow);
  return range;
}

function quickScales(control, low, high) {
  const buttons = QUICK_SCALES.filter((scale) => scale >= low && scale <= high).map((scale) => {
    const button = element("button", { type: "button", textContent: `${scale}×`, "data-scale": scale });
    button.addEventListener("click", () => {
      control.value = scale;
      control.dispatchEvent(new Event("set"));
      control.dispatchEvent(new Event("input", { bubbles: true }));
    });
    return button;
  });
  const show = () => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(Number(control.value) === Number(button.dataset.scale)));
  };
  for (const event of ["input", "set"]) control.addEventListener(event, show);
  show();
  return element("div", { className: "row quick", role: "group", "aria-label": "Usual scales" }, ...buttons);
}

// A file beside the picture, such as a mask: chosen from the disk, painted, or one that is here already.
function fileField(about, help) {
  const { id, name } = about;
  const control = element("input", { id, name, type: "file", accept: "image/*" });
  const now = element("span", { className: "soft" });
  const clear = element("button", { type: "button", textContent: "Remove", hidden: true });
  clear.setAttribute("aria-label", `Remove ${about.title.toLowerCase()}`);
  let value;
  const set = (given) => {
    value = given;
    if (!(given instanceof Blob)) control.value = "";
    clear.hidden = !given;
    now.textContent = !given ? "" : given instanceof Blob ? given.name : "the one of that prediction";
  };
  control.addEventListener("change", () => set(control.files[0]));
  clear.addEventListener("click", () => {
    set(undefined);
    control.dispatchEvent(new Event("input", { bubbles: true }));
  });
  const row = element("div", { className: "row" }, described(control, help), now, clear);
  return { root: element("div", { className: "wide" }, label(about), row), get: () => value, set };
}
