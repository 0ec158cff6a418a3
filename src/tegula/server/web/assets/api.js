// Talks to the API of the server that this page came from. Nothing else calls the server.
//
// A browser that is signed in has a cookie, which no script can read; requests send it by themselves.

import { byId, element } from "./dom.js";

const LOOPBACK = /^(localhost|127(\.\d+){3}|\[::1\])$/;
const NO_ANSWER = "The server does not answer; it may have been stopped. Try again in a moment.";

// Where the server is mounted: a gateway may put a path before all of its addresses.
const MOUNT = new URL("..", import.meta.url).href;

// Return the full address of a path of this server, such as "/v1/account".
export function local(path) {
  return MOUNT + path.slice(1);
}

// An answer that is not a success, or none (`status` is 0); `message` is its sentence.
// `problem` is the body of the answer; `isTemporary` whether the same request may succeed a little
// later, after `retryAfter` seconds if the server says so; `remedy` a link or button to what helps, or null.
export class RequestError extends Error {
  constructor(status, sentence, problem = {}, retryAfter = null) {
    super(sentence);
    this.status = status;
    this.problem = problem;
    this.isTemporary = status === 0 || status === 429 || status >= 500;
    this.retryAfter = Number(retryAfter) || null;
    this.remedy = remedy(this);
  }
}

function remedy({ status, isTemporary }) {
  if (status === 404 || status === 410) return element("a", { href: local("/history"), textContent: "Look in your history." });
  if (status === 401) {
    const button = element("button", { type: "button", textContent: "Sign in" });
    button.addEventListener("click", () => document.dispatchEvent(new Event("sign-in")));
    return button;
  }
  if (status === 422 && byId("fields")) return element("a", { href: "#fields", textContent: "Change it on the form." });
  return isTemporary ? element("a", { href: location.href, textContent: "Load this page again." }) : null;
}

function problemError(status, text, retryAfter) {
  let problem = {};
  try {
    problem = JSON.parse(text);
  } catch {
    // A gateway answers with pages of its own.
  }
  const detail = status === 401 ? "This browser is not signed in any more."
    : String(problem.detail || `The server answered ${status}.`);
  const lines = detail.split("\n").map((line) => line.replace(/^- /, "")).filter(Boolean);
  return new RequestError(status, lines.join("; "), problem, retryAfter);
}

async function request(method, path, body, headers) {
  if (body !== undefined) {
    headers["content-type"] = "application/json";
    body = JSON.stringify(body);
  }
  const response = await fetch(local(path), { method, headers, body, cache: "no-store" }).catch(() => null);
  if (response === null) throw new RequestError(0, NO_ANSWER);
  if (!response.ok) {
    throw problemError(response.status, await response.text().catch(() => ""), response.headers.get("retry-after"));
  }
  return response;
}

// Return the JSON of an answer, or null where it has none.
export async function call(method, path, body) {
  const response = await request(method, path, body, { accept: "application/json" });
  return response.status === 204 ? null : response.json();
}

export async function text(path) {
  return (await request("GET", path, undefined, { accept: "text/plain" })).text();
}

export async function blob(path) {
  return (await request("GET", path, undefined, { accept: "image/*" })).blob();
}

// Upload a file; `onProgress` gets the share that is sent, 0..1. Returns the file as the API has it.
// An AbortSignal stops it. (fetch cannot tell how much of a body is sent.)
export function upload(file, onProgress = () => {}, signal = null) {
  return new Promise((resolve, reject) => {
    const form = new FormData(), sender = new XMLHttpRequest();
    form.append("content", file, file.name);
    sender.open("POST", local("/v1/files"));
    sender.upload.addEventListener("progress", (event) => onProgress(event.loaded / event.total));
    sender.addEventListener("error", () => reject(new RequestError(0, NO_ANSWER)));
    sender.addEventListener("abort", () => reject(new DOMException("The upload was stopped.", "AbortError")));
    sender.addEventListener("load", () => {
      if (sender.status >= 400) reject(problemError(sender.status, sender.responseText, sender.getResponseHeader("retry-after")));
      else resolve(JSON.parse(sender.responseText));
    });
    signal?.addEventListener("abort", () => sender.abort());
    sender.send(form);
  });
}

// Return an address of the API as one of this page's server: answers carry the public URL, and this
// page may have been opened by another name. `urls` are those of any prediction.
export function localAddress(address, urls) {
  const base = urls.web.slice(0, urls.web.lastIndexOf("/p/"));
  return address.startsWith(`${base}/`) ? local(address.slice(base.length)) : address;
}

// Follow the events of a prediction: `handlers` has functions by the name of the event, each called
// with its data. Returns a function that ends it; "done" ends it, too.
export function follow(prediction, handlers) {
  const address = `${localAddress(prediction.urls.stream, prediction.urls)}?logs=1&previews=1`;
  const stream = new EventSource(address);
  for (const [name, handler] of Object.entries(handlers)) {
    stream.addEventListener(name, (event) => event.data !== undefined && handler(event.data));
  }
  stream.addEventListener("done", () => stream.close());
  return () => stream.close();
}

// Sign this browser in by a token.
export async function signInWith(token) {
  await request("POST", "/v1/session", undefined, { authorization: `Bearer ${token.trim()}` });
}

export async function signOut() {
  await call("DELETE", "/v1/session");
}

// `tegula serve --demo` opens the page with its token behind the #, which browsers send nowhere.
// Only pages of this machine accept it: elsewhere somebody could send people a link that signs them
// in to an account of his own, and would then see their pictures.
export function takeTokenFromAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given === null) return null;
  history.replaceState(null, "", location.pathname + location.search);
  return LOOPBACK.test(location.hostname) ? given : null;
}

// A picture that is written into a page as a data: address, as a file.
export function fileOfDataAddress(address, name) {
  const comma = address.indexOf(",");
  const kind = address.slice(5, comma).split(";")[0];
  const bytes = Uint8Array.from(atob(address.slice(comma + 1)), (letter) => letter.charCodeAt(0));
  return new File([bytes], name, { type: kind });
}

// A picture of this server as a file, by its path or address, under the name that the server has for it.
export async function picture(address, name) {
  const path = address.startsWith(MOUNT) ? address.slice(MOUNT.length - 1) : address;
  const response = await request("GET", path, undefined, { accept: "image/*" });
  const sent = /filename\*?="?(?:utf-8'')?([^";]+)/i.exec(response.headers.get("content-disposition") || "");
  const content = await response.blob();
  return new File([content], sent ? decodeURIComponent(sent[1]) : name, { type: content.type });
}
