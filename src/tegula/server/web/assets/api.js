// Talks to the API of the server that this page came from, and keeps the token for it.
//
// The token stays in this tab's session storage and is sent in one header, to this origin alone.

const KEY = "tegula-token";
const LOOPBACK = /^(localhost|127(\.\d+){3}|\[::1\])$/;
const SILENT = "The server does not answer.";

// Where the server is mounted: a gateway may put a path before all of its addresses.
const MOUNT = new URL("..", import.meta.url).href;

// Return the full address of a path of this server, such as "/v1/account".
export function local(path) {
  return MOUNT + path.slice(1);
}

export class RequestError extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

// `tegula serve --demo` opens the page with its token behind the #, which browsers send nowhere.
// Only pages of this machine accept it: elsewhere somebody could send people a link that signs them
// in to an account of his own, and would then see their pictures.
function readTokenFromAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given === null) return;
  history.replaceState(null, "", location.pathname + location.search);
  if (LOOPBACK.test(location.hostname)) keepToken(given);
}

export function keepToken(token) {
  sessionStorage.setItem(KEY, token.trim());
}

export function forgetToken() {
  sessionStorage.removeItem(KEY);
}

export function hasToken() {
  return Boolean(sessionStorage.getItem(KEY));
}

async function request(method, path, body, accept) {
  const token = sessionStorage.getItem(KEY);
  const headers = { accept };
  if (token) headers.authorization = `Bearer ${token}`;
  if (body !== undefined && !(body instanceof FormData)) {
    headers["content-type"] = "application/json";
    body = JSON.stringify(body);
  }
  const response = await fetch(local(path), { method, headers, body, cache: "no-store" }).catch(() => null);
  if (response === null) throw new RequestError(0, SILENT);
  if (!response.ok) throw new RequestError(response.status, await sentence(response));
  return response;
}

async function sentence(response) {
  const problem = await response.json().catch(() => ({}));
  const detail = String(problem.detail || `The server answered ${response.status}.`);
  return detail.split("\n").map((line) => line.replace(/^- /, "")).filter(Boolean).join("; ");
}

export async function call(method, path, body) {
  const response = await request(method, path, body, "application/json");
  return response.status === 204 ? null : response.json();
}

export async function blob(path) {
  return (await request("GET", path, undefined, "image/*")).blob();
}

readTokenFromAddress();
