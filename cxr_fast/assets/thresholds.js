// The threshold slider: figures of one class from its saved counts. Without a script the part stays hidden.
(function () {
  var part = document.getElementById("thresholds");
  if (!part) return;
  var classes = JSON.parse(part.getAttribute("data-classes"));
  var select = part.querySelector("select"), range = part.querySelector("input"), back = part.querySelector("button");
  var cells = part.querySelector("tbody tr").cells;

  function share(count, of) { return of ? (count / of).toFixed(3) : "–"; }

  function show() {
    var one = classes[select.selectedIndex], point = one.points[range.value];
    var tp = point[1], fp = point[2], fn = one.counts[0] - tp, tn = one.counts[1] - fp;
    var limit = point[0] === null ? "above all" : String(point[0]);
    var own = Number(range.value) === one.chosen;
    var texts = [limit + (own ? " (model file)" : ""), share(tp, tp + fn), share(tn, tn + fp), share(tp, tp + fp),
      share(tn, tn + fn)].concat([tp, fp, fn, tn].map(function (count) { return count.toLocaleString("en"); }));
    texts.forEach(function (text, column) { cells[column].textContent = text; });
    range.setAttribute("aria-valuetext", limit);
  }

  function choose() {
    var one = classes[select.selectedIndex];
    range.max = one.points.length - 1;
    range.value = one.chosen === null ? Math.round(range.max / 2) : one.chosen;
    back.hidden = one.chosen === null;
    show();
  }

  select.addEventListener("change", choose);
  range.addEventListener("input", show);
  back.addEventListener("click", choose);
  part.hidden = false;
  choose();
})();
