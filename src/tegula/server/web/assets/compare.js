// A picture before and after, with an edge between the two that can be moved.
//
// The edge is moved by the slider under the picture, by its keys, or by dragging on the picture.
// Close up, the picture has one pixel on the screen for each of its own and is moved by dragging.

function element(tag, properties = {}, ...children) {
  const created = Object.assign(document.createElement(tag), properties);
  created.append(...children);
  return created;
}

// `more`: buttons to place beside those of the picture.
export function comparison(after, before, ...more) {
  const picture = element("img", { className: "after", src: after, alt: "The result" });
  const stack = element("div", { className: "stack" }, picture);
  const view = element("div", { className: "view" }, stack);
  const close = element("button", { type: "button", textContent: "Actual pixels" });
  close.setAttribute("aria-pressed", "false");
  const tools = element("div", { className: "row tools" }, ...more, close);
  const figure = element("figure", { className: "compare" }, view, tools);
  const slider = element("input", { type: "range", min: 0, max: 100, value: 50, step: "any" });
  slider.setAttribute("aria-label", "Where the source ends and the result begins");

  let hasSource = Boolean(before);
  const place = () => {
    const cut = hasSource ? view.scrollLeft + (slider.value / 100) * view.clientWidth : 0;
    stack.style.setProperty("--cut", `${cut}px`);
  };
  close.addEventListener("click", () => {
    const now = figure.classList.toggle("close");
    close.setAttribute("aria-pressed", String(now));
    if (now) {
      view.scrollLeft = (view.scrollWidth - view.clientWidth) / 2;
      view.scrollTop = (view.scrollHeight - view.clientHeight) / 2;
      view.tabIndex = 0;
    } else view.removeAttribute("tabindex");
    place();
  });
  if (hasSource) {
    const parts = sourceOver(stack, view, before);
    tools.prepend(slider);
    // Browsers cannot show every format that the server reads.
    parts[0].addEventListener("error", () => {
      hasSource = false;
      [slider, ...parts].forEach((part) => part.remove());
      place();
    });
  }
  slider.addEventListener("input", place);
  view.addEventListener("scroll", place);
  new ResizeObserver(place).observe(view);
  letDrag(view, figure, slider, place);
  return figure;
}

function sourceOver(stack, view, before) {
  const source = element("img", { className: "before", src: before, alt: "The source" });
  const edge = element("div", { className: "edge" });
  const tags = [
    element("span", { className: "tag left", textContent: "Source" }),
    element("span", { className: "tag right", textContent: "Result" }),
  ];
  stack.prepend(source);
  stack.append(edge);
  view.append(...tags);
  return [source, edge, ...tags];
}

function letDrag(view, figure, slider, place) {
  let from = null;
  const follow = (event) => {
    if (figure.classList.contains("close")) {
      view.scrollLeft -= event.clientX - from.clientX;
      view.scrollTop -= event.clientY - from.clientY;
      from = event;
    } else {
      const box = view.getBoundingClientRect();
      slider.value = (100 * (event.clientX - box.left)) / box.width;
      place();
    }
  };
  view.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.pointerType === "touch" && figure.classList.contains("close")) return;
    event.preventDefault();
    from = event;
    view.setPointerCapture(event.pointerId);
    if (!figure.classList.contains("close")) follow(event);
  });
  view.addEventListener("pointermove", (event) => from && follow(event));
  for (const end of ["pointerup", "pointercancel"]) view.addEventListener(end, () => (from = null));
}
