// The models that this server runs, as cards: what each makes, its README, and what it lacks if it
// cannot run here.

import { call, local, text } from "./api.js";
import { byId, attempt, element } from "./dom.js";
import { signIn } from "./signing-in.js";

function card(model) {
  const title = element("h2", { textContent: model.name });
  const parts = [element("p", { textContent: model.description })];
  if (model.example) {
    const image = element("img", {
      src: local(`/pages/${model.example}`), loading: "lazy", width: 640, height: 320,
      alt: `A part of a photograph, and what ${model.name} makes of it`,
    });
    const caption = element("figcaption", { className: "soft", textContent: "Left the source, right the result with the packaged weights." });
    parts.push(element("figure", {}, image, caption));
  }
  if (model.obstacle) {
    const remedy = element("p", {}, ...inline(model.remedy));
    parts.push(element("div", { className: "obstacle" }, element("p", { textContent: model.obstacle }), remedy));
  } else {
    const address = local(`/?model=${encodeURIComponent(model.name)}`);
    parts.push(element("p", {}, element("a", { className: "button", href: address, textContent: "Use it", "aria-label": `Use ${model.name}` })));
  }
  const details = element("details", {}, element("summary", { textContent: "Readme" }));
  details.addEventListener("toggle", () => attempt(async () => {
    if (details.open && details.childElementCount === 1) details.append(readme(await text(`/v1/models/${model.name}/readme`)));
  }));
  parts.push(details);
  return element("article", { className: "card", "data-model": model.name }, title, ...parts);
}

// The Markdown that READMEs of models are written in: headings, tables, lists, code, paragraphs.
function readme(markdown) {
  const root = element("div", { className: "readme", tabIndex: 0, role: "group", "aria-label": "Readme" });
  let table = null;
  for (const line of markdown.split("\n")) {
    const cells = /^\|(.*)\|\s*$/.exec(line)?.[1].split("|").map((cell) => cell.trim());
    if (!cells) table = null;
    if (cells?.every((cell) => /^:?-+:?$/.test(cell))) continue;
    if (cells) {
      const kind = table ? "td" : "th";
      if (!table) root.append((table = element("table")));
      table.append(element("tr", {}, ...cells.map((cell) => element(kind, {}, ...inline(cell)))));
      continue;
    }
    const heading = /^(#+)\s+(.*)/.exec(line);
    if (heading) {
      if (heading[1].length > 1) root.append(element("h3", {}, ...inline(heading[2])));
    } else if (line.trim()) root.append(element("p", {}, ...inline(line.replace(/^[-*] /, "• "))));
  }
  return root;
}

function inline(words) {
  return words.split(/(`[^`]+`)/).map((part) => (/^`.+`$/.test(part) ? element("code", { textContent: part.slice(1, -1) }) : part));
}

attempt(async () => {
  await signIn();
  const { models } = await call("GET", "/v1/web/workbench");
  const lacking = models.filter(({ obstacle }) => obstacle).length;
  byId("lacking").hidden = !lacking;
  byId("lacking").textContent = `${models.length - lacking} models can run; ${lacking} lack files, which their cards name.`;
  byId("models").replaceChildren(...models.map(card));
});
