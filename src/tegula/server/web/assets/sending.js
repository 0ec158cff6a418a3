// From a picture on the form to a prediction, and from a prediction's addresses back to files.

import { call, fileOfDataAddress, localAddress, picture as fetchPicture, upload } from "./api.js";
import { formatBytes, formatSeconds } from "./dom.js";
import { scaleInput } from "./form.js";
import { publish } from "./state.js";

const WAIT_MS = 4000;
const MOST_RETRIES = 100;
const SAY_AGAIN_MS = 10_000;

// Create a prediction of a picture; files among the inputs are sent first. `say` gets what happens.
// An AbortSignal stops it with an AbortError, and then no prediction is left behind.
export async function create(model, picture, inputs, say = () => {}, signal = null) {
  const sent = { ...inputs, [model.image]: picture.address || picture.file };
  for (const [name, value] of Object.entries(sent)) {
    if (!(value instanceof Blob)) continue;
    const what = `${value.name}, ${formatBytes(value.size)}`;
    say(`Sending ${what} …`);
    const show = (share) => say(`Sending ${what}: ${Math.round(100 * share)} %`);
    sent[name] = (await retryWhileBusy(() => upload(value, show, signal), say, signal)).urls.get;
  }
  say("Starting …");
  const prediction = await retryWhileBusy(() => call("POST", `/v1/models/${model.name}/predictions`, { input: sent }), say, signal);
  // It was stopped while the server created it.
  if (signal?.aborted) await call("POST", `/v1/predictions/${prediction.id}/cancel`).catch(() => {});
  publish("predictions");
  signal?.throwIfAborted();
  return prediction;
}

// Do some work, again and again for as long as the server answers that it is busy.
async function retryWhileBusy(work, say, signal) {
  for (let tries = 0; ; tries++) {
    signal?.throwIfAborted();
    try {
      return await work();
    } catch (error) {
      if (![429, 503].includes(error.status) || tries === MOST_RETRIES) throw error;
      await countDown(error.retryAfter ? 1000 * error.retryAfter : WAIT_MS, say, signal);
    }
  }
}

// Wait, and say now and then how long it still is.
async function countDown(wait, say, signal) {
  const end = Date.now() + wait;
  for (let left = wait; left > 0 && !signal?.aborted; left = end - Date.now()) {
    say(`The server is busy; trying again in ${formatSeconds(Math.ceil(left / 1000))} …`);
    await pause(Math.min(left, SAY_AGAIN_MS), signal);
  }
}

// Return after a time, or as soon as it is stopped.
function pause(time, signal) {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, time);
    signal?.addEventListener("abort", end);
  });
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
