// The page of one prediction: its state as it changes, its result beside its source, its sharing.

import { blob, call, follow, localAddress } from "./api.js";
import { comparison } from "./compare.js";
import { at, attempt, formatSeconds, showError } from "./dom.js";
import { signIn } from "./signing-in.js";

const LINE = /^\s*(\d+)%\s*\|.+?\|\s*\d+\/\d+\s*\[([\d:]+)<([\d:]+)/;
const ACTIVE = ["starting", "processing"];
const WORDS = { starting: "Waiting", processing: "Running", succeeded: "Done", failed: "Failed",
  canceled: "Cancelled", aborted: "Deadline passed" };
const LOOK_AGAIN_MS = 3000;

const id = decodeURIComponent(location.pathname.split("/").pop());
const share = new URLSearchParams(location.search).get("share");
const path = share
  ? `/v1/shared/${encodeURIComponent(share)}`
  : `/v1/predictions/${encodeURIComponent(id)}`;
let shown = null;
let stream = null;
let drawn = false;

function seconds(clock) {
  return clock.split(":").reduce((sum, part) => 60 * sum + Number(part), 0);
}

function addresses(value) {
  if (typeof value === "string") return /^(https?:|data:image\/)/.test(value) ? [value] : [];
  return value && typeof value === "object" ? Object.values(value).flatMap(addresses) : [];
}

function showProgress(logs) {
  const found = logs.split("\n").map((line) => LINE.exec(line)).filter(Boolean).pop();
  const running = shown.status === "processing";
  at("progress").hidden = !running && shown.status !== "starting";
  if (running && found) at("progress").value = found[1] / 100;
  else at("progress").removeAttribute("value");
  if (!running) return;
  const left = found && seconds(found[3]);
  const soon = left ? `about ${formatSeconds(left)} left` : "almost done";
  at("status").textContent = found ? `${found[1]} %, ${soon}` : "Just started.";
}

function showState() {
  const { status, metrics } = shown;
  at("state").textContent = WORDS[status] || status;
  at("state").dataset.state = status;
  document.title = `${WORDS[status] || status} · ${shown.model} · tegula`;
  at("error").textContent = shown.error || "";
  const run = metrics.predict_time, whole = metrics.total_time;
  let text = status === "starting" ? "It starts once the model is loaded and the predictions before it are done." : "";
  if (run !== undefined) text = `It ran for ${formatSeconds(run)} and waited for ${formatSeconds(Math.max(0, whole - run))}.`;
  if (shown.data_removed) text += " Its source, result and log have been removed.";
  at("status").textContent = text.trim();
  at("logs").textContent = shown.logs || "";
  showProgress(shown.logs || "");
}

function showInput() {
  const rows = Object.entries(shown.input).flatMap(([name, value]) => {
    const term = document.createElement("dt"), described = document.createElement("dd");
    term.textContent = name;
    const text = typeof value === "string" ? value : JSON.stringify(value);
    described.textContent = text.length > 300 ? `${text.slice(0, 300)} …` : text || "—";
    return [term, described];
  });
  at("input").replaceChildren(...rows);
}

function objectUrl(uri) {
  const [head, data] = [uri.slice(5, uri.indexOf(",")), uri.slice(uri.indexOf(",") + 1)];
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: head.split(";")[0] }));
}

function download(address, original, number, many) {
  const link = document.createElement("a");
  const type = /^data:image\/(\w+)/.exec(original);
  const ending = type ? type[1].replace("jpeg", "jpg") : original.split(".").pop();
  link.className = "button main";
  link.href = address;
  link.download = `${id}${many ? `-${number + 1}` : ""}.${ending}`;
  link.textContent = many ? `Download ${number + 1}` : "Download";
  return link;
}

async function showOutput() {
  if (drawn || shown.status !== "succeeded" || !shown.output) return;
  drawn = true;
  const source = await blob(`${path}/source`).then(URL.createObjectURL, () => null);
  const originals = addresses(shown.output);
  const local = originals.map((one) => (one.startsWith("data:") ? objectUrl(one) : localAddress(one, shown.urls)));
  const many = local.length > 1;
  at("output").replaceChildren(
    ...local.map((address, number) =>
      comparison(address, source, download(address, originals[number], number, many)),
    ),
  );
}

function showActions() {
  const own = !share, active = ACTIVE.includes(shown.status);
  at("cancel").hidden = !own || !active;
  at("sharing").hidden = !own || active || shown.data_removed;
  at("remove").hidden = !own || active || shown.data_removed;
}

function show(prediction) {
  shown = prediction;
  showError("");
  at("shown").hidden = false;
  at("title").textContent = prediction.model;
  showState();
  showInput();
  showActions();
  if (prediction.data_removed) at("output").replaceChildren();
  showOutput();
}

// Log lines come as they are written; the prediction itself is asked for when its state changes.
function watchEvents() {
  if (stream) return;
  let logs = "";
  stream = follow(shown, {
    logs(lines) {
      logs += `${lines.replace(/\n$/, "")}\n`;
      at("logs").textContent = logs;
      if (shown.status === "starting") refresh();
      else showProgress(logs);
    },
    done: refresh,
  });
}

async function refresh() {
  try {
    show(await call("GET", path));
  } catch (error) {
    showError(error.message, error.wayOn);
    if (error.status) return;
  }
  if (shown && ACTIVE.includes(shown.status)) {
    watchEvents();
    clearTimeout(refresh.timer);
    refresh.timer = setTimeout(refresh, LOOK_AGAIN_MS);
  }
}

function showSharing(link) {
  at("share").checked = Boolean(link);
  at("shared").hidden = !link;
  at("link").value = link || "";
}

at("cancel").addEventListener("click", () => attempt(async () => {
  at("cancel").disabled = true;
  show(await call("POST", `${path}/cancel`));
}));

at("share").addEventListener("change", () => attempt(async () => {
  const wanted = at("share").checked;
  at("share").checked = !wanted;
  const answer = await call(wanted ? "POST" : "DELETE", `${path}/share`);
  showSharing(answer && answer.url);
}));

at("copy").addEventListener("click", async () => {
  at("link").select();
  // Browsers offer the clipboard only to pages over TLS and to those of this machine.
  if (navigator.clipboard) await navigator.clipboard.writeText(at("link").value).catch(() => {});
  else document.execCommand("copy");
  at("copy").textContent = "Copied";
});

at("remove").addEventListener("click", () => {
  if (!confirm("Remove the source, the result and the log of this prediction for good?")) return;
  attempt(async () => {
    await call("DELETE", path);
    await refresh();
  });
});

async function open() {
  at("id").textContent = id;
  await attempt(async () => {
    if (!share) await signIn();
    await refresh();
    if (!share && shown) showSharing((await call("GET", `${path}/share`)).url);
  });
}

open();
