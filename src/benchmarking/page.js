"use strict";
// A click on a column's head sorts its table, and the address keeps the order, so that it can be
// sent to somebody: #<table>:<column>:<ascending or descending>.

// Numbers by size, words by the alphabet, and what was not measured last in either direction.
function compareCells(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const numbers = [Number(a), Number(b)];
  if (numbers.some(Number.isNaN)) return sign * a.localeCompare(b);
  return sign * (numbers[0] - numbers[1]);
}

function sortTable(table, key, direction) {
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex((head) => head.dataset.key === key);
  if (column < 0) return;
  const sign = direction === "descending" ? -1 : 1;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) =>
    compareCells(a.cells[column].dataset.value, b.cells[column].dataset.value, sign));
  table.tBodies[0].append(...rows);
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    head.querySelector("button").addEventListener("click", () => {
      const again = head.getAttribute("aria-sort") === "ascending";
      const direction = again ? "descending" : "ascending";
      sortTable(table, head.dataset.key, direction);
      history.replaceState(null, "", `#${table.id}:${head.dataset.key}:${direction}`);
    });
  }
}

const [id, key, direction] = decodeURIComponent(location.hash.slice(1)).split(":");
const asked = key ? document.getElementById(id) : null;
if (asked) {
  sortTable(asked, key, direction);
  asked.scrollIntoView();
}
