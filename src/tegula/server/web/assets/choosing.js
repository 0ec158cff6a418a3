// Choosing pictures on the start page: from a dialog, by dropping or pasting them, or by address. The
// last choice wins, however long an earlier one takes to read.

import { byId, attempt, element, formatBytes, showError } from "./dom.js";
import { openAddress, openFile, openTransfer, whyNotTaken } from "./pictures.js";
import { pictureOf } from "./sending.js";
import { readSettings } from "./settings.js";
import { createState } from "./state.js";

const MOST_PICTURES = 1000;

// `reading` while the last choice is read: nothing is sent until then. Pictures are those of pictures.js
// with a `refusal`, a sentence for those that are left out of what is sent, or "".
export const chosen = createState({ pictures: [], reading: false });
export const sendable = () => chosen.get().pictures.filter((picture) => !picture.refusal);

let choices = 0;
let serverKnown = () => {};
const server = new Promise((resolve) => (serverKnown = resolve));
let listeners = { onReplace() {}, onSettings() {} };

// Begin a choice. The function that is returned says whether no other has begun since.
export function beginChoice() {
  const own = ++choices;
  return () => own === choices;
}

// Take pictures once the server has said what it takes.
export function takePictures(limits) {
  serverKnown(limits);
}

export async function chooseFiles(files) {
  showError("");
  if (files.length > MOST_PICTURES) {
    showError(`You chose ${files.length} files; choose up to ${MOST_PICTURES} at a time.`);
    return;
  }
  const isLast = beginChoice();
  chosen.set({ reading: true });
  const limits = await server;
  const opened = [];
  for (const file of files) opened.push(await openFile(file));
  if (!isLast()) return;
  // Files that are no pictures stay on the list with the reason, and are left out of what is sent.
  const pictures = opened.map((picture) => ({ ...picture, refusal: whyNotTaken(picture, limits) }));
  replacePictures(pictures);
  const settings = pictures.length === 1 && !pictures[0].refusal ? await readSettings(pictures[0].file) : null;
  if (isLast()) listeners.onSettings(settings);
}

function chooseAddress(text) {
  attempt(async () => {
    if (text.startsWith("data:image/")) {
      const blob = await pictureOf(text, "dropped");
      return chooseFiles([blob]);
    }
    const picture = openAddress(text), isLast = beginChoice();
    await server;
    if (!isLast()) return;
    replacePictures([{ ...picture, refusal: "" }]);
    listeners.onSettings(null);
  });
}

export function replacePictures(pictures) {
  const before = chosen.get().pictures;
  listeners.onReplace(before);
  for (const { url } of before) if (url) URL.revokeObjectURL(url);
  chosen.set({ pictures, reading: false });
}

function describe({ name, file, width, height, kind, address }) {
  const size = width ? `${width} × ${height}` : "";
  const what = address ? "fetched by the server" : [kind === "HEIC" && "no preview", formatBytes(file.size)].filter(Boolean).join(" · ");
  return [name, size, what].filter(Boolean).join(" · ");
}

function showPictures({ pictures }) {
  const [one] = pictures;
  const single = pictures.length === 1;
  byId("preview").hidden = !single || !one.url;
  if (single && one.url) byId("preview").src = one.url;
  byId("chosen").textContent = single ? describe(one) : `${pictures.length} pictures`;
  if (!pictures.length) byId("chosen").replaceChildren(element("strong", { textContent: "Drop photographs or a folder here" }), ", paste one, or choose files");
  byId("pictures").hidden = pictures.length < 2;
  byId("pictures").replaceChildren(...(single ? [] : pictures.map(line)));
}

function line(picture) {
  const remove = element("button", { type: "button", textContent: "Remove", "aria-label": `Remove ${picture.name}` });
  remove.addEventListener("click", () => chosen.set({ pictures: chosen.get().pictures.filter((other) => other !== picture) }));
  const fault = picture.refusal && element("span", { className: "error", textContent: picture.refusal });
  return element("li", { className: "row" }, element("span", { className: "grow" }, picture.refusal ? fault : describe(picture)), remove);
}

async function takeTransfer(transfer, what) {
  const { files, address } = await openTransfer(transfer);
  if (files.length) await chooseFiles(files);
  else if (address && (what === "dropped" || /^(https?:\/\/\S+|data:image\/\S+)$/.test(address))) chooseAddress(address);
  else if (what === "dropped") showError("What you dropped is neither a file nor an address; drop a picture, or choose one.");
}

// Listen to every way to choose a picture, while the form is there to take it. `onReplace` gets the
// pictures that others take the place of; `onSettings` those of a single result of tegula, or null.
export function startChoosing(given) {
  listeners = given;
  let shown = null;
  chosen.watch((value) => {
    if (value.pictures !== shown) showPictures(value);
    shown = value.pictures;
  });
  const isTaking = () => !byId("upscale-form").hidden;
  byId("file").addEventListener("change", () => byId("file").files.length && chooseFiles([...byId("file").files]));
  byId("choose-folder").addEventListener("click", () => byId("folder").click());
  byId("folder").addEventListener("change", () => {
    const files = [...byId("folder").files].filter((file) => !file.name.startsWith("."));
    if (files.length) chooseFiles(files);
  });
  byId("take-address").addEventListener("click", () => chooseAddress(byId("address").value.trim()));
  byId("address").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    chooseAddress(byId("address").value.trim());
  });
  document.addEventListener("paste", (event) => {
    const isWriting = event.target.matches?.("input, textarea") && !event.clipboardData.files.length;
    if (isTaking() && !isWriting) attempt(() => takeTransfer(event.clipboardData, "pasted"));
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    byId("drop").classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) byId("drop").classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    byId("drop").classList.remove("over");
    if (isTaking()) attempt(() => takeTransfer(event.dataTransfer, "dropped"));
  });
}
