// Where to go from a prediction: its picture and inputs on the form again, or its result as the picture.

import { local } from "./api.js";
import { byId, element } from "./dom.js";

function link(text, query) {
  return element("a", { className: "button", href: local(query ? `/?${query}` : "/"), textContent: text });
}

// Show the links in #go-on; `own` is whether the prediction is the caller's, and not one that is shared.
export function showGoOn(shown, own) {
  const id = own && !shown.data_removed ? encodeURIComponent(shown.id) : null;
  const links = [
    own && shown.data_removed && link("Choose another picture", ""),
    id && link("Again with other settings", `again=${id}`),
    id && shown.status === "succeeded" && link("Enlarge the result further", `from=${id}`),
  ].filter(Boolean);
  const addresses = (all) => all.map(({ href }) => href).join(" ");
  // What has the focus stays where it is while a prediction runs.
  if (addresses([...byId("go-on").children]) !== addresses(links)) byId("go-on").replaceChildren(...links);
}
