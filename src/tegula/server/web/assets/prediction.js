// The page of one prediction: how it grows, its result beside its source, its sharing.

import { blob, call, fileOfDataAddress, follow, localAddress } from "./api.js";
import { byId, attempt, element, formatBytes, formatSeconds, isActive, showError, STATUS_WORDS } from "./dom.js";
import { showGoOn } from "./go-on.js";
import { placeWords, showRunning } from "./running.js";
import { signIn } from "./signing-in.js";
import { createState, publish, subscribe } from "./state.js";
import { openViewer } from "./viewer.js";

const PROGRESS_LINE = /^\s*(\d+)%\s*\|.+?\|\s*\d+\/\d+\s*\[([\d:]+)<([\d:]+)/;
const POLL_MS = 2000;

const id = decodeURIComponent(location.pathname.split("/").pop());
const share = new URLSearchParams(location.search).get("share");
const path = share
  ? `/v1/shared/${encodeURIComponent(share)}`
  : `/v1/predictions/${encodeURIComponent(id)}`;
const web = share ? path : `/v1/web/predictions/${encodeURIComponent(id)}`;

// What the page shows: the prediction as the API has it, what stands beside it, its log as it is
// written, and the last preview.
const page = createState({ shown: null, facts: null, logs: "", preview: null, own: !share });

function seconds(clock) {
  return clock.split(":").reduce((sum, part) => 60 * sum + Number(part), 0);
}

function addresses(value) {
  if (typeof value === "string") return /^(https?:|data:image\/)/.test(value) ? [value] : [];
  return value && typeof value === "object" ? Object.values(value).flatMap(addresses) : [];
}

function progressOf(logs) {
  const found = logs.split("\n").map((line) => PROGRESS_LINE.exec(line)).filter(Boolean).pop();
  return found && { percent: Number(found[1]), left: seconds(found[3]) };
}

// The lines of the log that do not report progress: what was found, and what could not be done.
function notesOf(logs, active) {
  const lines = logs.split(/[\n\r]+/).map((line) => line.trim()).filter((line) => line && !/^\d+%\s*\|/.test(line));
  return [...new Set(lines)].filter((line) => active || !line.startsWith("Expected to take"));
}

function statusWords({ shown, facts, logs }) {
  const { predict_time: run, total_time: whole } = shown.metrics;
  if (shown.status === "starting") {
    return facts?.place ? placeWords(facts.place) : "It starts once the predictions before it are done.";
  }
  if (shown.status === "processing") {
    const found = progressOf(logs);
    if (!found) return "Just started.";
    return `${found.percent} %, ${found.left ? `about ${formatSeconds(found.left)} left` : "almost done"}`;
  }
  const words = [];
  if (run !== undefined) words.push(`It ran for ${formatSeconds(run)} and waited for ${formatSeconds(Math.max(0, whole - run))}.`);
  if (shown.data_removed) words.push("Its source, result and log have been removed.");
  return words.join(" ");
}

page.watch(({ shown, own }) => shown && showGoOn(shown, own));
page.watch(({ shown, facts, logs, preview, own }) => {
  if (!shown) return;
  const active = isActive(shown);
  byId("shown").hidden = false;
  byId("title").textContent = shown.model;
  document.title = `${STATUS_WORDS[shown.status] || shown.status} · ${facts?.name || shown.model} · tegula`;
  byId("state").textContent = STATUS_WORDS[shown.status] || shown.status;
  byId("state").dataset.state = shown.status;
  byId("status").textContent = statusWords({ shown, facts, logs });
  byId("error").textContent = shown.error || "";
  byId("logs").textContent = logs;
  const notes = notesOf(logs, active);
  byId("notes").hidden = !notes.length;
  byId("notes").replaceChildren(...notes.map((text) => element("li", { textContent: text })));
  byId("progress").hidden = !active;
  const found = shown.status === "processing" && progressOf(logs);
  if (found) byId("progress").value = found.percent / 100;
  else byId("progress").removeAttribute("value");
  byId("growing").hidden = !active || !preview;
  if (active && preview && byId("preview").src !== preview.address) {
    byId("preview").src = preview.address;
    byId("preview-words").textContent = preview.words;
  }
  byId("cancel").hidden = !own || !active;
  byId("sharing").hidden = !own || active || shown.data_removed;
  byId("remove").hidden = !own || active || shown.data_removed;
  byId("kept-until").textContent = facts?.removed_at
    ? `They go by themselves at ${new Date(facts.removed_at).toLocaleString()}; download what you want to keep.` : "";
});
byId("preview").addEventListener("error", () => (byId("growing").hidden = true));

function pairs(list, entries) {
  list.replaceChildren(...entries.flatMap(([name, text]) =>
    [element("dt", { textContent: name }), element("dd", { textContent: text })]));
}

function showInput(shown) {
  pairs(byId("input"), Object.entries(shown.input).map(([name, value]) => {
    const text = typeof value === "string" ? value : JSON.stringify(value);
    return [name, text.length > 300 ? `${text.slice(0, 300)} …` : text || "—"];
  }));
}

function fileWords(manifest, file) {
  const format = file.type.replace("image/", "").replace("jpeg", "jpg").toUpperCase();
  return `${manifest.width} × ${manifest.height} px, ${format}, ${formatBytes(file.size)}`;
}

// What stands beside a result: it is what a person asks first of a picture.
function showFacts({ shown, facts }, viewer) {
  const settings = viewer.manifest.settings || {}, asked = settings.asked || {};
  const chosen = Object.entries({ ...shown.input, ...asked })
    .filter(([name, value]) => ["scale", "preset", "creativity", "resemblance", "prompt"].includes(name) && value !== "" && value !== null)
    .map(([name, value]) => `${name} ${value}`);
  const entries = [
    ["Result", fileWords(viewer.manifest, facts.outputs[0])],
    viewer.before && facts.source && ["Source", `${facts.name ? `${facts.name}, ` : ""}${fileWords(viewer.before, facts.source)}`],
    shown.metrics.predict_time !== undefined && ["Time", formatSeconds(shown.metrics.predict_time)],
    ["Seed", String(settings.seed ?? shown.input.seed ?? "—")],
    ["Net", `${settings.bundle || "—"} (${shown.model})`],
    ["Chosen", chosen.join(", ") || "nothing but the picture"],
  ];
  pairs(byId("facts"), entries.filter(Boolean));
  byId("facts").hidden = false;
}

function download(address, original, number, many) {
  const type = /^data:image\/(\w+)/.exec(original);
  const ending = type ? type[1].replace("jpeg", "jpg") : original.split(".").pop();
  return element("a", {
    className: "button main",
    href: address,
    download: `${id}${many ? `-${number + 1}` : ""}.${ending}`,
    textContent: many ? `Download ${number + 1}` : "Download",
  });
}

let hasOutput = false; // on the page
async function showOutput() {
  const { shown, facts } = page.get();
  if (shown.data_removed) {
    byId("output").replaceChildren();
    byId("facts").hidden = true;
  }
  if (hasOutput || shown.status !== "succeeded" || !shown.output || !facts) return;
  hasOutput = true;
  const originals = addresses(shown.output), many = originals.length > 1;
  for (const [number, original] of originals.entries()) {
    const address = original.startsWith("data:")
      ? URL.createObjectURL(fileOfDataAddress(original, "result"))
      : localAddress(original, shown.urls);
    const link = download(address, original, number, many);
    const wait = element("p", { className: "soft", role: "status", textContent: "The picture is being prepared …" });
    byId("output").append(wait);
    try {
      const paths = { after: `${web}/tiles/${number}`, before: facts.source && `${web}/tiles/source` };
      const viewer = await openViewer(paths, [link]);
      byId("output").append(viewer.element);
      if (number === 0) showFacts({ shown, facts }, viewer);
    } catch (error) {
      byId("output").append(element("p", { className: "error", textContent: `${error.message} ` }),
        [404, 410].includes(error.status) ? error.remedy : link);
    }
    wait.remove();
  }
}

let stream = null;
function watchEvents() {
  if (stream) return;
  page.set({ logs: "" });
  stream = follow(page.get().shown, {
    logs(lines) {
      page.set({ logs: `${page.get().logs}${lines.replace(/\n$/, "")}\n` });
      if (page.get().shown.status === "starting") refresh();
    },
    preview(address) {
      page.set({ preview: { address: localAddress(address, page.get().shown.urls), words: "So far; it becomes sharper." } });
    },
    done: refresh,
  });
}

let nextRefresh = 0;
async function refresh() {
  let wait = POLL_MS;
  try {
    const [shown, facts] = await Promise.all([call("GET", path), call("GET", share ? `${path}/facts` : web)]);
    showError("");
    page.set({ shown, facts, ...(isActive(shown) ? {} : { logs: shown.logs || "" }) });
    showInput(shown);
  } catch (error) {
    showError(error.message, error.remedy);
    if (!error.isTemporary) return;
    wait = Math.max(wait, 1000 * error.retryAfter);
  }
  const { shown } = page.get();
  if (!shown) return;
  if (isActive(shown)) {
    watchEvents();
    clearTimeout(nextRefresh);
    nextRefresh = setTimeout(refresh, wait);
  } else await showOutput();
}

// Until there is a preview, the source itself shows what is being worked on.
async function showSource() {
  const { shown, preview } = page.get();
  if (!shown || preview || !isActive(shown)) return;
  const source = await blob(`${path}/source`).catch(() => null);
  if (source && !page.get().preview) {
    page.set({ preview: { address: URL.createObjectURL(source), words: "The source." } });
  }
}

function showSharing(link) {
  byId("share").checked = Boolean(link);
  byId("shared").hidden = !link;
  byId("link").value = link || "";
}

subscribe("signed-in", refresh);

byId("cancel").addEventListener("click", () => attempt(async () => {
  byId("cancel").disabled = true;
  await call("POST", `${path}/cancel`);
  publish("predictions");
  await refresh();
}));

byId("share").addEventListener("change", () => attempt(async () => {
  const wanted = byId("share").checked;
  byId("share").checked = !wanted;
  const answer = await call(wanted ? "POST" : "DELETE", `${path}/share`);
  showSharing(answer && answer.url);
  await refresh();
}));

byId("copy").addEventListener("click", async () => {
  byId("link").select();
  // Browsers offer the clipboard only to pages over TLS and to those of this machine.
  if (navigator.clipboard) await navigator.clipboard.writeText(byId("link").value).catch(() => {});
  else document.execCommand("copy");
  byId("copy").textContent = "Copied";
});

byId("remove").addEventListener("click", () => {
  if (!confirm("Remove the source, the result and the log of this prediction for good?")) return;
  attempt(async () => {
    await call("DELETE", path);
    publish("predictions");
    await refresh();
  });
});

attempt(async () => {
  byId("id").textContent = id;
  if (!share) await signIn();
  await refresh();
  const { shown } = page.get();
  if (!shown || share) return;
  showSource();
  showRunning("others", { except: id });
  showSharing((await call("GET", `${path}/share`)).url);
});
