"use strict";
// The cards are complete without this: it filters them, steps through them, and keeps marks, which stay in this browser
// until they are saved as a CSV file.
(function () {
  var cards = Array.prototype.slice.call(document.querySelectorAll(".card")), marks = {}, at = -1;
  var bar = document.getElementById("bar"), selects = bar.querySelectorAll("select");
  var words = ["keep", "flip", "unknown"], place = "cxr-fast review " + document.title;

  // With the label: a mark of one that was corrected since is of another label, and would turn the correction back.
  function key(card) {
    var of = card.dataset;
    return of.sha ? [of.sha, of.label, of.class].join(" ") : "";
  }

  function load() {
    try { marks = JSON.parse(localStorage.getItem(place)) || {}; } catch (error) { marks = {}; }
  }

  function keep() {
    try { localStorage.setItem(place, JSON.stringify(marks)); } catch (error) { /* a browser that keeps nothing */ }
  }

  function draw(card) {
    card.querySelectorAll(".marks button").forEach(function (button) {
      button.setAttribute("aria-pressed", String(marks[key(card)] === button.textContent));
    });
  }

  function tell() { document.getElementById("marked").textContent = table().length - 1; }

  // The same film and class may be on several cards: a mark is of all of them.
  function mark(card, word) {
    var name = key(card);
    if (!name) return;
    if (marks[name] === word) delete marks[name]; else marks[name] = word;
    cards.forEach(function (other) { if (key(other) === name) draw(other); });
    keep();
    tell();
  }

  function table() {
    var rows = [["card", "image_sha256", "class", "label", "mark"]], seen = {};
    cards.forEach(function (card) {
      var name = key(card);
      if (!name || !marks[name] || seen[name]) return;
      seen[name] = true;
      rows.push([card.id.slice(5), card.dataset.sha, card.dataset.class, card.dataset.label, marks[name]]);
    });
    return rows;
  }

  function quoted(cell) { return /[",\r\n]/.test(cell) ? '"' + cell.replace(/"/g, '""') + '"' : cell; }

  function csv() { return table().map(function (row) { return row.map(quoted).join(",") + "\r\n"; }).join(""); }

  function save() {
    var link = document.createElement("a"), file = new Blob([csv()], { type: "text/csv" });
    link.href = URL.createObjectURL(file);
    link.download = document.getElementById("save").dataset.name;
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 10000);
  }

  function fits(card) {
    return Array.prototype.every.call(selects, function (select) {
      var by = select.dataset.by, value = select.value;
      if (value === "") return true;
      if (by === "m") return (value === "marked") === Boolean(marks[key(card)]);
      return card.dataset[by] === value;
    });
  }

  function filter() {
    var shown = 0;
    cards.forEach(function (card) { card.hidden = !fits(card); shown += !card.hidden; });
    document.querySelectorAll(".list").forEach(function (list) { list.hidden = !list.querySelector(".card:not([hidden])"); });
    var all = shown === cards.length;
    document.querySelectorAll("section").forEach(function (section) {
      section.hidden = !all && !section.querySelector(".card:not([hidden])");
    });
    document.getElementById("count").textContent = shown + " of " + cards.length + " cards";
    at = -1;
  }

  function step(by) {
    var next = at + by;
    while (next >= 0 && next < cards.length && cards[next].hidden) next += by;
    if (next < 0 || next >= cards.length) return;
    at = next;
    cards[at].focus({ preventScroll: true });
    cards[at].scrollIntoView({ block: "start" });
  }

  function all() {
    var on = document.body.classList.toggle("maps");
    document.getElementById("maps").setAttribute("aria-pressed", String(on));
  }

  load();
  cards.forEach(function (card, number) {
    card.addEventListener("focusin", function () { at = number; });
    card.addEventListener("click", function (event) {
      at = number;
      if (event.target.closest(".card > .film")) event.target.closest(".film").classList.toggle("on");
    });
    if (!key(card)) return;
    var row = document.createElement("div");
    row.className = "marks";
    words.forEach(function (word) {
      var button = document.createElement("button");
      button.type = "button";
      button.textContent = word;
      button.addEventListener("click", function () { mark(card, word); });
      row.appendChild(button);
    });
    card.appendChild(row);
    draw(card);
  });
  selects.forEach(function (select) { select.addEventListener("change", filter); });
  bar.addEventListener("submit", function (event) { event.preventDefault(); });
  document.getElementById("maps").addEventListener("click", all);
  document.getElementById("save").addEventListener("click", save);
  document.addEventListener("keydown", function (event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    var name = event.key;
    if (name === "j" || name === "ArrowRight") step(1);
    else if (name === "k" || name === "ArrowLeft") step(-1);
    else if (name === "h") all();
    else if (/^[123]$/.test(name) && at >= 0 && !cards[at].hidden) mark(cards[at], words[name - 1]);
    else return;
    event.preventDefault();
  });
  bar.hidden = false;
  filter();
  tell();
  window.review = { csv: csv, step: step, mark: mark };
})();
