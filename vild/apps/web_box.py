"""Drawing a box on the page's image, in the browser."""

# A drag, or two clicks or taps: window.drawnBox is [x0, y0, x1, y1], two opposite corners in fractions of the image,
# which is as large as fits into its element and in its middle; null without a box. (gradio's own coordinates of a click
# are wrong where it enlarges an image.) A finger's drag scrolls the page.
DRAW = """() => {
  let first = null, down = null, image = null;
  const shape = () => {
    const box = image.getBoundingClientRect(), {naturalWidth: w, naturalHeight: h} = image;
    const size = Math.min(box.width / w, box.height / h), [width, height] = [size * w, size * h];
    return {left: box.left + (box.width - width) / 2, top: box.top + (box.height - height) / 2, width, height};
  };
  const at = event => {
    const {left, top, width, height} = shape(), within = x => Math.min(Math.max(x, 0), 1);
    return [within((event.clientX - left) / width), within((event.clientY - top) / height)];
  };
  const draw = (a, b) => {
    const mark = document.querySelector("#drawn") || Object.assign(document.createElement("div"), {id: "drawn"});
    if (!a) return mark.remove();
    const {left, top, width, height} = shape(), around = image.parentElement;
    const origin = around.getBoundingClientRect();
    around.style.position = "relative";
    around.append(mark);
    mark.style.left = left - origin.left - around.clientLeft + Math.min(a[0], b[0]) * width + "px";
    mark.style.top = top - origin.top - around.clientTop + Math.min(a[1], b[1]) * height + "px";
    mark.style.width = Math.abs(a[0] - b[0]) * width + "px";
    mark.style.height = Math.abs(a[1] - b[1]) * height + "px";
  };
  const set = (a, b) => { window.drawnBox = a && b ? [...a, ...b] : null; draw(a, b || a); };
  const again = () => { if (window.drawnBox) draw(drawnBox.slice(0, 2), drawnBox.slice(2)); else draw(first, first); };
  const on = (name, act, also) => document.addEventListener(name, event => {
    if (event.target.matches && event.target.matches("#image img")) { image = event.target; act(event); }
  }, also);
  on("dragstart", event => event.preventDefault());
  on("load", () => { first = down = null; set(); }, true);
  on("pointerdown", event => {
    if (event.button) return;
    down = {corner: at(event), x: event.pageX, y: event.pageY};
    image.setPointerCapture(event.pointerId);
  });
  on("pointercancel", () => { down = null; again(); });
  on("pointermove", event => {
    const start = down && event.pointerType == "mouse" ? down.corner : first;
    if (start) draw(start, at(event));
  });
  on("pointerup", event => {
    if (!down) return;
    const [a, b, far] = [down.corner, at(event), Math.hypot(event.pageX - down.x, event.pageY - down.y) > 6];
    down = null;
    if (far || first) { set(far ? a : first, b); first = null; }
    else { set(b); first = b; }
    document.querySelector("#by-example > button:not(.open)")?.click();
  });
  new ResizeObserver(() => { if (image?.isConnected) again(); }).observe(document.querySelector("#image"));
}"""
