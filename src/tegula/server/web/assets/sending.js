// From a picture on the form to a prediction, and from a prediction's addresses back to files.

import { call, localAddress, picture as fetchPicture, upload } from "./api.js";
import { formatBytes, formatSeconds } from "./dom.js";
import { scaleInput } from "./form.js";
import { fileOfDataAddress } from "./pictures.js";
import { tell } from "./state.js";

const WAIT_MS = 4000;
const SECOND_TRIES = 100;

// Create a prediction of a picture; files among the inputs are sent first. `say` gets what happens.
export async function create(model, picture, inputs, say = () => {}, signal = null) {
  const sent = { ...inputs, [model.image]: picture.address || picture.file };
  for (const [name, value] of Object.entries(sent)) {
    if (!(value instanceof Blob)) continue;
    const what = `${value.name}, ${formatBytes(value.size)}`;
    say(`Sending ${what} …`);
    const show = (share) => say(`Sending ${what}: ${Math.round(100 * share)} %`);
    sent[name] = (await patiently(() => upload(value, show, signal), say, signal)).urls.get;
  }
  say("Starting …");
  const made = await patiently(() => call("POST", `/v1/models/${model.name}/predictions`, { input: sent }), say, signal);
  tell("predictions");
  return made;
}

// A server that is busy says so, and takes the work a little later.
async function patiently(work, say, signal) {
  for (let tries = 0; ; tries++) {
    try {
      return await work();
    } catch (error) {
      if (![429, 503].includes(error.status) || tries === SECOND_TRIES || signal?.aborted) throw error;
      const wait = error.retryAfter ? 1000 * error.retryAfter : WAIT_MS;
      say(`The server is busy; trying again in ${formatSeconds(wait / 1000)} …`);
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

// A picture of the server, or one within the address itself, as a file. `urls` are those of its
// prediction; without them the address is a path of the API.
export async function pictureOf(address, name, urls = null) {
  if (address.startsWith("data:")) {
    const ending = /^data:image\/(\w+)/.exec(address)?.[1].replace("jpeg", "jpg") || "png";
    return fileOfDataAddress(address, /\.\w+$/.test(name) ? name : `${name}.${ending}`);
  }
  return fetchPicture(urls ? localAddress(address, urls) : address, name);
}

// The name of a result: holiday.tif at four times the size becomes holiday_4x.png.
export function resultName(name, model, inputs, ending = null) {
  const stem = name.replace(/\.[^.]*$/, "") || name;
  const scale = inputs[scaleInput(model)];
  const size = scale ? `${Number(scale.toFixed(2))}x` : "larger";
  return `${stem}_${size}.${ending || inputs.format || inputs.output_format || "png"}`;
}
