// The settings that a result of tegula carries in its file, read without sending the file anywhere.
//
// They are one JSON text: PNG has it in a text chunk named tegula, compressed where it is long; the
// other formats have it in their XMP packet, as tegula:settings.

const KEY = "tegula";
const MOST_SEARCHED = 1 << 24;

// Return the settings as an object, or null where there are none.
export async function readSettings(file) {
  const bytes = new Uint8Array(await file.slice(0, MOST_SEARCHED).arrayBuffer());
  const isPng = bytes[0] === 0x89 && bytes[1] === 0x50;
  try {
    const text = isPng ? await pngText(file) : xmpText(bytes);
    const found = text && JSON.parse(text);
    return found && typeof found === "object" && !Array.isArray(found) ? found : null;
  } catch {
    return null; // damaged settings are as good as none
  }
}

async function pngText(file) {
  const utf8 = new TextDecoder(), latin = new TextDecoder("latin1");
  let at = 8;
  while (at + 12 <= file.size) {
    const head = new DataView(await file.slice(at, at + 8).arrayBuffer());
    const size = head.getUint32(0), kind = latin.decode(head.buffer.slice(4));
    if (["tEXt", "zTXt", "iTXt"].includes(kind)) {
      const data = new Uint8Array(await file.slice(at + 8, at + 8 + size).arrayBuffer());
      const end = data.indexOf(0);
      if (latin.decode(data.slice(0, end)) === KEY) {
        if (kind === "tEXt") return latin.decode(data.slice(end + 1));
        if (kind === "zTXt") return latin.decode(await inflated(data.slice(end + 2)));
        const compressed = data[end + 1] === 1;
        const language = data.indexOf(0, end + 3), title = data.indexOf(0, language + 1);
        const content = data.slice(title + 1);
        return utf8.decode(compressed ? await inflated(content) : content);
      }
    }
    at += size + 12;
  }
  return null;
}

async function inflated(data) {
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

function xmpText(bytes) {
  const text = new TextDecoder().decode(bytes);
  const found = /<tegula:settings[^>]*>([\s\S]*?)<\/tegula:settings>/.exec(text) || /tegula:settings="([^"]*)"/.exec(text);
  if (!found) return null;
  const parsed = new DOMParser().parseFromString(`<x>${found[1]}</x>`, "text/xml");
  return parsed.documentElement.textContent;
}

const NOT_OF_A_MODEL = new Set(["crop", "max_pixels", "window_batch", "size", "resolution", "scale"]);

// Return {inputs, others}: what the settings are for the inputs of a model, and the names of those that
// were chosen and that the model has no input for. The size is taken as it was asked for.
export function inputsFrom(settings, model) {
  const asked = settings.asked && typeof settings.asked === "object" ? settings.asked : {};
  const has = (name) => name in model.inputs.properties;
  const inputs = {};
  for (const [name, value] of Object.entries({ ...settings, ...asked })) {
    if (has(name) && name !== model.image && value !== null && typeof value !== "object") inputs[name] = value;
  }
  for (const name of ["scale", "resolution"]) {
    if (has(name) && asked[name] === undefined) delete inputs[name];
    else if (has(name)) inputs[name] = asked[name];
  }
  const others = Object.keys(asked).filter((name) => !has(name) && !NOT_OF_A_MODEL.has(name));
  return { inputs, others };
}
