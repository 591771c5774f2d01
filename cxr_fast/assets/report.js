"use strict";
// The page is complete without this: it only lets the heads of tables sort them. Undefined values stay last.
(function () {
  function key(row, column) {
    var cell = row.cells[column], value = cell.getAttribute("data-v");
    if (value === null) return cell.textContent.trim() || null;
    return value === "" ? null : Number(value);
  }

  function compare(a, b) {
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  }

  function sort(table, column) {
    var body = table.tBodies[0], head = table.tHead.rows[0].cells[column];
    var rows = Array.prototype.slice.call(body.rows);
    var numeric = rows.some(function (row) { return typeof key(row, column) === "number"; });
    var now = head.getAttribute("aria-sort");
    var rising = now === "none" ? !numeric : now === "descending";
    rows.sort(function (a, b) {
      var x = key(a, column), y = key(b, column);
      if (x === null || y === null) return (x === null) - (y === null);
      return rising ? compare(x, y) : compare(y, x);
    });
    rows.forEach(function (row) { body.appendChild(row); });
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (cell) { cell.setAttribute("aria-sort", "none"); });
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  }

  document.querySelectorAll("table.sortable").forEach(function (table) {
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (head, column) {
      var button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.addEventListener("click", function () { sort(table, column); });
      head.textContent = "";
      head.appendChild(button);
      head.setAttribute("aria-sort", "none");
    });
  });
})();
