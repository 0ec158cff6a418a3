// The predictions that wait or run: for each a picture of the work so far, its progress or its place
// in the queue, and a button to cancel it.

import { call, follow, local, localAddress } from "./api.js";
import { byId, attempt, element, formatSeconds } from "./dom.js";
import { publish, subscribe } from "./state.js";

const POLL_MS = 2000;

// Return where a waiting prediction stands, in words; `place` is from the facts of a prediction.
export function placeWords({ ahead, seconds }) {
  const when = seconds < 1 ? "in a moment" : `in about ${formatSeconds(seconds)}`;
  if (!ahead) return `It is next, and starts ${when}.`;
  return `${ahead === 1 ? "One is" : `${ahead} are`} before it; it starts ${when}.`;
}

function createCard(entry) {
  const picture = element("img", { alt: "", src: local(`/v1/web/predictions/${entry.id}/thumbnail`) });
  picture.addEventListener("error", () => (picture.hidden = true));
  const link = element("a", { href: local(`/p/${entry.id}`), textContent: entry.name || entry.id });
  const words = element("span", { className: "soft grow" });
  const bar = element("progress", { max: 1, "aria-label": `Progress of ${entry.name || entry.id}` });
  const cancel = element("button", { type: "button", textContent: "Cancel", "aria-label": `Cancel ${entry.name || entry.id}` });
  cancel.addEventListener("click", () => attempt(async () => {
    cancel.disabled = true;
    await call("POST", `/v1/predictions/${entry.id}/cancel`);
    publish("predictions");
  }));
  const card = element("li", { className: "running" }, picture,
    element("div", { className: "grow" }, element("div", { className: "row" }, link, words, cancel), bar));
  let unfollow = null;

  async function show(now) {
    if (now.status === "starting") {
      bar.removeAttribute("value");
      const { place } = await call("GET", `/v1/web/predictions/${entry.id}`).catch(() => ({}));
      words.textContent = place ? placeWords(place) : "";
      return;
    }
    bar.value = now.progress;
    words.textContent = `${Math.round(100 * now.progress)} %`;
    if (unfollow) return;
    unfollow = () => {}; // until the stream is open, so that only one is opened
    const prediction = await call("GET", `/v1/predictions/${entry.id}`).catch(() => null);
    if (!prediction || !unfollow) return;
    unfollow = follow(prediction, {
      preview(address) {
        picture.hidden = false;
        picture.src = localAddress(address, prediction.urls);
      },
      done() {
        publish("predictions");
      },
    });
  }
  return { card, show, close: () => { unfollow?.(); unfollow = null; } };
}

// Show what waits or runs in `#${name}-list` of the section `#${name}`, without the prediction
// `except`, as long as the page is open. `onEnd` is called when one is over. Resolves once it is known
// what runs: a page that then loads what is over misses nothing that ends meanwhile.
export function showRunning(name, { except = null, onEnd = () => {} } = {}) {
  const cards = new Map();
  let timer = 0;

  async function look() {
    clearTimeout(timer);
    const page = await call("GET", "/v1/web/history?status=active").catch(() => null);
    if (page) {
      const active = page.results.filter((entry) => entry.id !== except).reverse();
      const ids = new Set(active.map((entry) => entry.id));
      let hasEnded = false;
      for (const [id, one] of cards) {
        if (ids.has(id)) continue;
        one.close();
        one.card.remove();
        cards.delete(id);
        hasEnded = true;
      }
      for (const entry of active) {
        if (!cards.has(entry.id)) {
          cards.set(entry.id, createCard(entry));
          byId(`${name}-list`).append(cards.get(entry.id).card);
        }
        cards.get(entry.id).show(entry);
      }
      byId(name).hidden = cards.size === 0;
      if (hasEnded) onEnd();
    }
    timer = setTimeout(look, POLL_MS * (cards.size || document.hidden ? 1 : 5));
  }

  subscribe("predictions", look);
  return look();
}
