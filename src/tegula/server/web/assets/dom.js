// Small helpers for what is on a page: elements, sizes and times in words, errors in their place.

export const at = (id) => document.getElementById(id);

// `properties` are those of the element; "aria-..." and "data-..." become attributes.
export function element(tag, properties = {}, ...children) {
  const created = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) created.setAttribute(name, value);
    else created[name] = value;
  }
  created.append(...children.filter((child) => child !== null && child !== undefined));
  return created;
}

export function formatBytes(bytes) {
  if (bytes < 1e3) return `${bytes} B`;
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

export function formatSeconds(total) {
  if (total < 10) return `${Number(total.toFixed(1))} s`;
  if (total < 90) return `${Math.round(total)} s`;
  return total < 5400 ? `${Math.round(total / 60)} min` : `${(total / 3600).toFixed(1)} h`;
}

// Show a sentence at the top of the page, with a way on if there is one: an element such as a link.
export function showError(sentence, wayOn = null) {
  at("page-error").replaceChildren(...(sentence ? [sentence] : []), ...(wayOn ? [" ", wayOn] : []));
}

// Do some work; what goes wrong is shown at the top of the page, and what may go well a little later
// can be tried again from there, with all that is on the page. Returns whether it went well.
export async function attempt(work) {
  showError("");
  try {
    await work();
    return true;
  } catch (error) {
    let { wayOn } = error;
    if (error.passes) {
      wayOn = element("button", { type: "button", textContent: "Try again" });
      wayOn.addEventListener("click", () => attempt(work));
    }
    showError(error.message, wayOn);
    at("page-error").scrollIntoView({ block: "nearest" });
    return false;
  }
}
