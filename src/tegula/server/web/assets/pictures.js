// Pictures before they are sent: what kind of file it is, how large, whether the server takes it, and
// how large the result would be. Each refusal names the file as its owner knows it, and says what fits.

import { element, formatBytes } from "./dom.js";
import { scaleInput } from "./form.js";

const HEAD_BYTES = 1 << 18;
const READ = "PNG, JPEG, WebP, AVIF, TIFF, BMP and GIF";
// Pixels a side that a format holds.
const LONGEST_SIDE = { jpg: 65_500, webp: 16_383 };
const SHOW_TIMEOUT_MS = 15_000;

// A picture is {name, file, address, kind, width, height, url}: either a file or an address that the
// server fetches. `url` shows it where the browser can; sizes are 0 where they are not known.

export async function openFile(file) {
  const picture = { name: file.name || "picture.png", file, kind: null, width: 0, height: 0, url: null };
  let head;
  try {
    head = new Uint8Array(await file.slice(0, HEAD_BYTES).arrayBuffer());
  } catch {
    return { ...picture, kind: "unreadable" };
  }
  picture.kind = kindOf(head);
  if (!picture.kind) return picture;
  const url = URL.createObjectURL(file);
  const shown = element("img", { src: url, alt: "" });
  const canShow = await Promise.race([
    new Promise((resolve) => {
      shown.onload = () => resolve(true);
      shown.onerror = () => resolve(false);
    }),
    new Promise((resolve) => setTimeout(resolve, SHOW_TIMEOUT_MS, false)),
  ]);
  if (canShow) return { ...picture, url, width: shown.naturalWidth, height: shown.naturalHeight };
  // Browsers cannot show every format that the server reads.
  URL.revokeObjectURL(url);
  const sizes = { HEIC: () => heicSize(head), TIFF: () => tiffSize(file, head) };
  try {
    const [width, height] = await (sizes[picture.kind]?.() ?? [0, 0]);
    return { ...picture, width, height };
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return picture; // it is cut off; the server says what it can do with it
  }
}

export function openAddress(text) {
  let address;
  try {
    address = new URL(text.trim());
  } catch {
    throw new Error(`“${text.slice(0, 80)}” is not an address; it begins with https://.`);
  }
  if (address.protocol === "file:") {
    throw new Error(`${address.pathname.split("/").pop()} is a file on your machine: drop the file itself, or choose it.`);
  }
  if (!/^https?:$/.test(address.protocol)) {
    throw new Error(`Addresses of pictures begin with https:// or http://, not ${address.protocol}`);
  }
  const last = decodeURIComponent(address.pathname.split("/").pop() || "");
  return { name: last || address.host, address: address.href, kind: "address", width: 0, height: 0, url: null };
}

const SIGNATURES = [
  ["PNG", 0, [0x89, 0x50, 0x4e, 0x47]],
  ["JPEG", 0, [0xff, 0xd8, 0xff]],
  ["GIF", 0, [0x47, 0x49, 0x46, 0x38]],
  ["BMP", 0, [0x42, 0x4d]],
  ["TIFF", 0, [0x49, 0x49, 0x2a, 0]],
  ["TIFF", 0, [0x4d, 0x4d, 0, 0x2a]],
  ["TIFF", 0, [0x49, 0x49, 0x2b, 0]],
  ["WebP", 8, [0x57, 0x45, 0x42, 0x50]],
];
const HEIF_BRANDS = /^(heic|heix|hevc|hevx|heim|heis|mif1|msf1)$/;

function kindOf(bytes) {
  const signature = SIGNATURES.find(([, at, wanted]) => wanted.every((byte, place) => bytes[at + place] === byte));
  if (signature) return signature[0];
  const text = (from, to) => String.fromCharCode(...bytes.slice(from, to));
  if (text(4, 8) !== "ftyp") return null;
  const brands = text(8, Math.min(64, (bytes[2] << 8) | bytes[3])).match(/.{4}/gs) || [];
  if (brands.includes("avif") || brands.includes("avis")) return "AVIF";
  return brands.some((brand) => HEIF_BRANDS.test(brand)) ? "HEIC" : null;
}

// The largest of the boxes that say how large an image item is; the others are of thumbnails and tiles.
function heicSize(bytes) {
  const view = new DataView(bytes.buffer);
  let best = [0, 0];
  for (let at = 4; at + 16 <= bytes.length; at++) {
    if (bytes[at] !== 0x69 || view.getUint32(at) !== 0x69737065) continue; // "ispe"
    const size = [view.getUint32(at + 8), view.getUint32(at + 12)];
    if (size[0] * size[1] > best[0] * best[1]) best = size;
  }
  return best;
}

async function tiffSize(file, head) {
  const view = new DataView(head.buffer), little = head[0] === 0x49;
  if (head[2] !== 0x2a && head[3] !== 0x2a) return [0, 0]; // BigTIFF
  const at = view.getUint32(4, little);
  const part = new DataView(await file.slice(at, at + 4098).arrayBuffer());
  const size = {};
  for (let entry = 0; entry < (part.byteLength ? part.getUint16(0, little) : 0); entry++) {
    const place = 2 + 12 * entry;
    if (place + 12 > part.byteLength) break;
    const short = part.getUint16(place + 2, little) === 3;
    size[part.getUint16(place, little)] = short ? part.getUint16(place + 8, little) : part.getUint32(place + 8, little);
  }
  return [size[256] || 0, size[257] || 0];
}

// The width and height that a model would make of a picture, or null where that is not known.
export function resultSize(model, inputs, { width, height }) {
  if (!width) return null;
  const scale = scaleInput(model);
  let factor = scale ? inputs[scale] : undefined;
  if ("resolution" in model.inputs.properties) factor = inputs.resolution / Math.min(width, height);
  if ("task_type" in model.inputs.properties) factor = /Large/.test(inputs.task_type) ? 4 : /Medium/.test(inputs.task_type) ? 2 : 1;
  if (!factor) return null;
  if (inputs.downscaling) factor *= Math.min(1, (inputs.downscaling_resolution ?? 768) / Math.max(width, height));
  return [Math.max(1, Math.round(width * factor)), Math.max(1, Math.round(height * factor))];
}

function inPixels(count) {
  return count < 1e6 ? `${count} pixels` : `${Number((count / 1e6).toFixed(count < 1e7 ? 1 : 0))} megapixels`;
}

// Why the server would not take a file, whatever the settings; "" if it would.
export function whyNotTaken({ name, file, kind, width, height }, { limits, reads_heic: readsHeic }) {
  if (!file) return "";
  if (kind === "unreadable") return `${name} cannot be read; it may have been moved or removed, or it is a folder. Choose it again.`;
  if (!file.size) return `${name} is empty.`;
  if (!kind) return `${name} is not a picture that this server reads: it reads ${READ}${readsHeic ? ", and HEIC" : ""}.`;
  if (kind === "HEIC" && !readsHeic) {
    return `${name} is a HEIC picture, which this server cannot read; save it as JPEG or PNG. (Its operator can add the extra heic.)`;
  }
  if (file.size > limits.upload_bytes) {
    return `${name} has ${formatBytes(file.size)}, and this server takes files of up to ${formatBytes(limits.upload_bytes)}; save it as JPEG, or smaller.`;
  }
  if (width * height > limits.pixels) {
    const share = Math.sqrt(limits.pixels / (width * height));
    return `${name} has ${width} × ${height} pixels, more than the ${inPixels(limits.pixels)} that this server takes; ${Math.floor(width * share)} × ${Math.floor(height * share)} would fit.`;
  }
  return "";
}

// Why the result would be refused, as {sentence, fitting}; `fitting` is a change of the inputs that
// makes it fit, as {label, inputs}, if there is one. Null if the result is fine.
export function whyTooLarge(picture, model, inputs, { limits }) {
  const size = resultSize(model, inputs, picture);
  if (!size) return null;
  const [width, height] = size;
  const scale = scaleInput(model);
  const wouldBe = `${picture.name} would become ${width} × ${height} pixels`;
  if (width * height > limits.pixels) {
    const fits = Math.floor(100 * Math.sqrt(limits.pixels / (picture.width * picture.height))) / 100;
    const least = scale ? model.inputs.properties[scale].minimum : Infinity;
    const sentence = `${wouldBe}, more than the ${inPixels(limits.pixels)} that this server makes`;
    if (scale && fits >= least) {
      const fitting = { label: `Use ${fits}×`, inputs: { [scale]: model.inputs.properties[scale].type === "integer" ? Math.floor(fits) : fits } };
      return { sentence: `${sentence}; at ${fits}× it fits.`, fitting };
    }
    const share = Math.sqrt(limits.pixels / (width * height));
    return { sentence: `${sentence}; a picture of ${Math.floor(picture.width * share)} × ${Math.floor(picture.height * share)} pixels fits.`, fitting: null };
  }
  const name = "format" in model.inputs.properties ? "format" : "output_format";
  const most = LONGEST_SIDE[inputs[name]];
  if (most && Math.max(width, height) > most) {
    const sentence = `${wouldBe}, and ${inputs[name].toUpperCase()} holds at most ${most} a side; PNG holds it.`;
    return { sentence, fitting: { label: "Use PNG", inputs: { [name]: "png" } } };
  }
  return null;
}

// What was dropped or pasted: files, those within folders too, or an address. An address that comes
// along with a file is where the browser got the file from.
export async function openTransfer(transfer) {
  const entries = [...transfer.items].map((item) => item.kind === "file" && item.webkitGetAsEntry?.()).filter(Boolean);
  const plain = [...transfer.files];
  const folders = entries.some((entry) => entry.isDirectory);
  const text = transfer.getData("text/uri-list") || transfer.getData("text/plain");
  if (folders) return { files: (await Promise.all(entries.map(filesIn))).flat(), address: null };
  if (plain.length) return { files: plain, address: null };
  const line = text.split("\n").map((one) => one.trim()).find((one) => one && !one.startsWith("#")) || null;
  return { files: [], address: line };
}

async function filesIn(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return file.name.startsWith(".") ? [] : [file];
  }
  const reader = entry.createReader(), found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    found.push(...some);
  }
  return (await Promise.all(found.map(filesIn))).flat();
}
