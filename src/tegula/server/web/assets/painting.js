// Drawing on a picture: a rectangle that is moved and sized, rectangles with prompts, and a mask that is
// painted with a brush. All of it works by pointer, touch and keys.

import { element } from "./dom.js";

const UNDOS = 20;
const LONGEST_MASK = 1024; // pixels; the server lays a mask of any size over the picture
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// A rectangle over a picture, in its pixels. `side`: of the square that it is at first; `most`: of its
// longest side. Returns {root, get, focus}; `get` gives its place and size.
export function boxOver(picture, { side, most = Infinity, label }) {
  const image = element("img", { src: picture.url, alt: "The picture", draggable: false });
  const handle = element("button", { type: "button", className: "box" });
  const stage = element("div", { className: "stage" }, image, handle);
  const least = Math.min(8, picture.width, picture.height);
  const first = Math.min(side, picture.width, picture.height);
  let box = {
    x: Math.round((picture.width - first) / 2), y: Math.round((picture.height - first) / 2),
    width: first, height: first,
  };
  const set = (wanted) => {
    const width = Math.round(clamp(wanted.width, least, Math.min(most, picture.width)));
    const height = Math.round(clamp(wanted.height, least, Math.min(most, picture.height)));
    const x = Math.round(clamp(wanted.x, 0, picture.width - width));
    const y = Math.round(clamp(wanted.y, 0, picture.height - height));
    box = { x, y, width, height };
    place(handle, box, picture);
    handle.setAttribute("aria-label", `${label}: ${width} × ${height} pixels at ${x}, ${y}. Arrow keys move it, with Shift they size it.`);
  };
  handle.addEventListener("keydown", (event) => {
    const [across, down] = ARROWS[event.key] || [];
    if (across === undefined) return;
    event.preventDefault();
    const step = Math.max(1, Math.round(Math.min(picture.width, picture.height) / 40));
    if (event.shiftKey) set({ ...box, width: box.width + across * step, height: box.height + down * step });
    else set({ ...box, x: box.x + across * step, y: box.y + down * step });
  });
  let from = null;
  stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    handle.focus();
    stage.setPointerCapture(event.pointerId);
    const at = pixel(event, stage, picture);
    const inside = at.x >= box.x && at.x < box.x + box.width && at.y >= box.y && at.y < box.y + box.height;
    from = { ...at, box: inside ? box : null };
  });
  stage.addEventListener("pointermove", (event) => {
    if (!from) return;
    const at = pixel(event, stage, picture);
    if (from.box) set({ ...from.box, x: from.box.x + at.x - from.x, y: from.box.y + at.y - from.y });
    else set({ x: Math.min(at.x, from.x), y: Math.min(at.y, from.y), width: Math.abs(at.x - from.x), height: Math.abs(at.y - from.y) });
  });
  for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => (from = null));
  set(box);
  return { root: stage, get: () => box, focus: () => handle.focus() };
}

function pixel(event, stage, { width, height }) {
  const area = stage.getBoundingClientRect();
  return { x: ((event.clientX - area.left) / area.width) * width, y: ((event.clientY - area.top) / area.height) * height };
}

function place(shown, { x, y, width, height }, picture) {
  const share = (value, whole) => `${(100 * value) / whole}%`;
  shown.style.left = share(x, picture.width);
  shown.style.top = share(y, picture.height);
  shown.style.width = share(width, picture.width);
  shown.style.height = share(height, picture.height);
}

function openDialog(id, heading, help, ...parts) {
  const title = element("h2", { id: `${id}-title`, textContent: heading });
  const close = element("button", { type: "button", textContent: "Cancel" });
  const done = element("button", { type: "button", id: `${id}-done`, className: "main", textContent: "Done" });
  const dialog = element("dialog", { id, className: "tool", "aria-labelledby": title.id }, title, element("p", { className: "soft", textContent: help }), ...parts, element("div", { className: "row" }, done, close));
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return { dialog, done };
}

// Draw rectangles with prompts. `text` is what the input holds, a region a line; `use` gets it changed.
export function drawRegions({ picture, text, use }) {
  const box = boxOver(picture, { side: Math.min(picture.width, picture.height) / 2, label: "Region" });
  const prompt = element("input", { id: "region-prompt", type: "text" });
  const add = element("button", { type: "button", id: "region-add", textContent: "Add the region" });
  const error = element("p", { className: "error", role: "alert" });
  const list = element("ul", { className: "plain" });
  let regions = text.split("\n").map((line) => line.trim()).filter(Boolean);
  const show = () => {
    for (const old of box.root.querySelectorAll(".drawn")) old.remove();
    list.replaceChildren(...regions.map((region, number) => {
      const [numbers, ...words] = region.split(":");
      const [x, y, width, height] = numbers.split(",").map(Number);
      const shares = Math.max(x, y, width, height) <= 1;
      const [across, down] = shares ? [picture.width, picture.height] : [1, 1];
      const mark = element("span", { className: "drawn", textContent: number + 1 });
      place(mark, { x: x * across, y: y * down, width: width * across, height: height * down }, picture);
      box.root.append(mark);
      const remove = element("button", { type: "button", textContent: "Remove", "aria-label": `Remove region ${number + 1}` });
      remove.addEventListener("click", () => {
        regions = regions.filter((other) => other !== region);
        show();
      });
      return element("li", { className: "row" }, element("span", { className: "grow", textContent: `${number + 1}: ${words.join(":")}` }), remove);
    }));
  };
  add.addEventListener("click", () => {
    const words = prompt.value.trim();
    error.textContent = words ? "" : "Write what this part of the picture shows.";
    if (!words) return;
    const { x, y, width, height } = box.get();
    regions.push(`${x},${y},${width},${height}:${words}`);
    prompt.value = "";
    show();
  });
  prompt.addEventListener("keydown", (event) => event.key === "Enter" && add.click());
  const row = element("div", { className: "row" }, element("label", { className: "grow" }, "What this part shows ", prompt), add);
  const { dialog, done } = openDialog("regions", "Regions", "Draw a rectangle, write what it shows, and add it.", box.root, row, error, list);
  done.addEventListener("click", () => {
    if (prompt.value.trim()) add.click();
    use(regions.join("\n"));
    dialog.close();
  });
  show();
  box.focus();
}

// Paint a mask over a picture. `title`: what is painted; `keepsWhite`: painted parts are kept, not
// changed. `use` gets the mask as a PNG file.
export function paintMask({ picture, name, title, keepsWhite, use }) {
  const scale = Math.min(1, LONGEST_MASK / Math.max(picture.width, picture.height));
  const width = Math.max(1, Math.round(picture.width * scale)), height = Math.max(1, Math.round(picture.height * scale));
  const image = element("img", { src: picture.url, alt: "The picture", draggable: false });
  const canvas = element("canvas", { width, height, tabIndex: 0, className: "mask", role: "application" });
  const help = "Arrow keys move the brush over the picture, Space paints.";
  canvas.setAttribute("aria-label", `${title}. ${help}`);
  const ring = element("span", { className: "ring" });
  const stage = element("div", { className: "stage" }, image, canvas, ring);
  const size = element("input", { id: "brush-size", type: "range", min: 2, max: Math.max(8, Math.round(Math.min(width, height) / 2)), value: Math.max(4, Math.round(Math.min(width, height) / 8)) });
  const strength = element("input", { id: "brush-strength", type: "range", min: 10, max: 100, step: 10, value: 100 });
  const eraser = toggle("Eraser");
  const undo = action("Undo"), paintAll = action("Paint all"), clear = action("Clear"), invert = action("Invert");
  const drawing = canvas.getContext("2d", { willReadFrequently: true });
  const undos = [];
  let spot = { x: width / 2, y: height / 2 }, painting = false;

  const saveUndo = () => {
    undos.push(drawing.getImageData(0, 0, width, height));
    if (undos.length > UNDOS) undos.shift();
  };
  const colour = () => `rgb(${[0, 0, 0].fill(Math.round(2.55 * strength.value)).join(" ")})`;
  const stroke = (from, to) => {
    drawing.globalCompositeOperation = eraser.getAttribute("aria-pressed") === "true" ? "destination-out" : "source-over";
    Object.assign(drawing, { lineWidth: Number(size.value), lineCap: "round", strokeStyle: colour() });
    drawing.beginPath();
    drawing.moveTo(from.x, from.y);
    drawing.lineTo(to.x + 0.01, to.y);
    drawing.stroke();
    drawing.globalCompositeOperation = "source-over";
  };
  const showRing = () => {
    const radius = size.value / 2;
    place(ring, { x: spot.x - radius, y: spot.y - radius, width: size.value, height: size.value }, { width, height });
  };
  const undoable = (work) => () => {
    saveUndo();
    work();
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    saveUndo();
    painting = true;
    spot = pixel(event, stage, { width, height });
    stroke(spot, spot);
  });
  canvas.addEventListener("pointermove", (event) => {
    const to = pixel(event, stage, { width, height });
    if (painting) stroke(spot, to);
    spot = to;
    showRing();
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (painting = false));
  canvas.addEventListener("keydown", (event) => {
    const [across, down] = { ...ARROWS, " ": [0, 0] }[event.key] || [];
    if (across === undefined) return;
    event.preventDefault();
    const step = Math.max(1, size.value / 2);
    spot = { x: clamp(spot.x + across * step, 0, width), y: clamp(spot.y + down * step, 0, height) };
    showRing();
    if (event.key !== " ") return;
    saveUndo();
    stroke(spot, spot);
  });
  size.addEventListener("input", showRing);
  undo.addEventListener("click", () => undos.length && drawing.putImageData(undos.pop(), 0, 0));
  clear.addEventListener("click", undoable(() => drawing.clearRect(0, 0, width, height)));
  paintAll.addEventListener("click", undoable(() => {
    drawing.fillStyle = colour();
    drawing.fillRect(0, 0, width, height);
  }));
  // What is not painted becomes painted at full strength, and half of it half.
  invert.addEventListener("click", undoable(() => {
    const pixels = drawing.getImageData(0, 0, width, height);
    for (let at = 0; at < pixels.data.length; at += 4) {
      const value = 255 - Math.round((pixels.data[at] * pixels.data[at + 3]) / 255);
      pixels.data.fill(value, at, at + 3);
      pixels.data[at + 3] = value ? 255 : 0;
    }
    drawing.putImageData(pixels, 0, 0);
  }));
  const tools = element(
    "div",
    { className: "row" },
    element("label", {}, "Brush ", size),
    element("label", {}, "Strength ", strength),
    eraser, undo, paintAll, clear, invert,
  );
  const what = keepsWhite ? "What you paint stays as it is." : "What you paint may change, the rest stays; a weaker brush lets it change less.";
  const { dialog, done } = openDialog("painting", title, what, stage, tools);
  done.addEventListener("click", async () => {
    drawing.globalCompositeOperation = "destination-over";
    drawing.fillStyle = "#000";
    drawing.fillRect(0, 0, width, height);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    use(new File([blob], `${name}.png`, { type: "image/png" }));
    dialog.close();
  });
  showRing();
  canvas.focus();
}

function action(textContent) {
  return element("button", { type: "button", textContent });
}

function toggle(textContent) {
  const button = element("button", { type: "button", textContent, "aria-pressed": "false" });
  button.addEventListener("click", () => button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true")));
  return button;
}
