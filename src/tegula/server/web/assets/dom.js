// Small helpers for what is on a page: elements; sizes, times and states in words; errors in their place.

export const byId = (id) => document.getElementById(id);

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

// The status of a prediction as people read it.
export const STATUS_WORDS = { starting: "Waiting", processing: "Running", succeeded: "Done", failed: "Failed",
  canceled: "Cancelled", aborted: "Deadline passed" };

export const isActive = ({ status }) => ["starting", "processing"].includes(status);

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
export function showError(sentence, remedy = null) {
  byId("page-error").replaceChildren(...(sentence ? [sentence] : []), ...(remedy ? [" ", remedy] : []));
}

// Do some work, and show its error at the top of the page, with a button to try again where the error
// may be gone a little later; the page stays as it is. Returns whether the work succeeded.
export async function attempt(work) {
  showError("");
  try {
    await work();
    return true;
  } catch (error) {
    let { remedy } = error;
    if (error.isTemporary) {
      remedy = element("button", { type: "button", textContent: "Try again" });
      remedy.addEventListener("click", () => attempt(work));
    }
    showError(error.message, remedy);
    byId("page-error").scrollIntoView({ block: "nearest" });
    return false;
  }
}
