// What the account made, newest first: thumbnails, filters, removal, and when the data goes.

import { call, local } from "./api.js";
import { byId, attempt, element, formatSeconds, isActive, STATUS_WORDS } from "./dom.js";
import { showRunning } from "./running.js";
import { signIn } from "./signing-in.js";
import { publish, subscribe } from "./state.js";

let next = null;
let shown = [];
let lastLoad = 0;

function retention(entry) {
  if (entry.shared) return "shared, and kept as long as it is";
  if (!entry.removed_at) return "";
  const left = (new Date(entry.removed_at) - Date.now()) / 1000;
  return left > 0 ? `its data goes in ${formatSeconds(left)}` : "its data goes in a moment";
}

function createCard(entry) {
  const name = entry.name || entry.model;
  const link = element("a", { href: local(`/p/${encodeURIComponent(entry.id)}`) });
  if (entry.data_removed) link.append(element("span", { className: "gone soft", textContent: "removed" }));
  else {
    const picture = element("img", { alt: "", loading: "lazy", src: local(`/v1/web/predictions/${entry.id}/thumbnail`) });
    picture.addEventListener("error", () =>
      picture.replaceWith(element("span", { className: "gone soft", textContent: "no picture" })));
    link.append(picture);
  }
  link.append(element("strong", { textContent: name }));
  const { scale, preset } = entry.chosen;
  const facts = [STATUS_WORDS[entry.status]?.toLowerCase(), scale && `${scale}×`, preset, entry.seconds && formatSeconds(entry.seconds)];
  const card = element("li", { className: "card" }, link,
    element("span", { className: "soft", textContent: facts.filter(Boolean).join(", ") }),
    element("time", { className: "soft", dateTime: entry.created_at, textContent: new Date(entry.created_at).toLocaleString() }),
    entry.error && element("span", { className: "error", textContent: entry.error }),
    retention(entry) && element("span", { className: "soft", textContent: retention(entry) }));
  if (!entry.data_removed) {
    const remove = element("button", { type: "button", textContent: "Remove", "aria-label": `Remove ${name}` });
    remove.addEventListener("click", () => {
      if (!confirm(`Remove the source, the result and the log of ${name} for good?`)) return;
      attempt(async () => {
        await call("DELETE", `/v1/predictions/${entry.id}`);
        publish("predictions");
      });
    });
    card.append(remove);
  }
  return card;
}

function draw() {
  const wanted = byId("filters").elements.name.value.trim().toLowerCase();
  const found = shown.filter((entry) => (entry.name || entry.model).toLowerCase().includes(wanted));
  byId("predictions").replaceChildren(...found.map(createCard));
  byId("older").hidden = !next;
  byId("count").textContent = found.length ? "" : shown.length || next
    ? "None of these has such a name." : "Nothing is here yet; make a picture larger on the start page.";
}

function query(cursor) {
  const { status, model, source, removed } = byId("filters").elements;
  const words = new URLSearchParams();
  for (const one of [status, model, source]) if (one.value) words.set(one.name, one.value);
  if (removed.checked) words.set("removed", "true");
  if (cursor) words.set("cursor", cursor);
  return `/v1/web/history?${words}`;
}

async function load() {
  const turn = (lastLoad += 1);
  const page = await call("GET", query(null));
  if (turn !== lastLoad) return; // another answer is on its way
  shown = page.results.filter((entry) => !isActive(entry));
  next = page.next;
  byId("retention").textContent = page.retention_seconds
    ? `Source, result and log of a picture are removed ${formatSeconds(page.retention_seconds)} after it is done, unless it is shared; download what you want to keep.`
    : "Source, result and log are kept until you remove them.";
  draw();
}

byId("older").addEventListener("click", () => attempt(async () => {
  const page = await call("GET", query(next));
  shown = [...shown, ...page.results];
  next = page.next;
  draw();
}));
byId("filters").addEventListener("change", (event) => event.target.name !== "name" && attempt(load));
byId("filters").addEventListener("input", (event) => event.target.name === "name" && draw());
byId("filters").addEventListener("submit", (event) => event.preventDefault());

attempt(async () => {
  await signIn();
  await showRunning("running", { onEnd: () => attempt(load) });
  await load();
  const models = await call("GET", "/v1/models");
  byId("filters").elements.model.append(
    ...models.results.map(({ owner, name }) => element("option", { value: `${owner}/${name}`, textContent: `${owner}/${name}` })));
  byId("filters").hidden = false;
  subscribe("signed-in", () => attempt(load));
  subscribe("predictions", () => attempt(load));
  document.addEventListener("visibilitychange", () => document.hidden || attempt(load));
});
