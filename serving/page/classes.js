// The table of classes, and forgetting one of them.

import { ask } from "./api.js";
import { element } from "./results.js";

const SHOWN = 100;
const FILTER_FROM = 10;

const [body, filter, more, labels, dialog] = ["classes", "filter", "more", "labels", "forget"].map((id) =>
  document.getElementById(id),
);
let known = [];

export async function refresh() {
  known = (await ask("v1/classes")).data;
  document.getElementById("filter-field").hidden = known.length < FILTER_FROM;
  labels.replaceChildren(
    ...known.slice(0, 1000).map((one) => {
      const option = element("option");
      option.value = one.label;
      return option;
    }),
  );
  draw();
}

// Calls back with the label of a class that is to be forgotten.
export function onForget(act) {
  body.addEventListener("click", (event) => {
    const row = event.target.closest("button")?.closest("tr");
    if (row) confirm(row.dataset.label, Number(row.dataset.count));
  });
  document.getElementById("forget-yes").addEventListener("click", () => act(dialog.dataset.label));
}

filter.addEventListener("input", draw);

function draw() {
  const wanted = filter.value.toLowerCase();
  const found = known.filter((one) => one.label.toLowerCase().includes(wanted));
  body.replaceChildren(...found.slice(0, SHOWN).map(line));
  more.textContent = known.length
    ? found.length > SHOWN
      ? `${found.length - SHOWN} more: narrow them down above.`
      : ""
    : "No classes yet: drop images above and enrol them.";
}

function line(one) {
  const name = element("th");
  name.scope = "row";
  name.textContent = one.label;
  const forget = element("button", "danger", "Forget");
  forget.type = "button";
  forget.setAttribute("aria-label", `Forget ${one.label}`);
  const row = element("tr", "", name, number(one.count), number(one.enrolled), element("td", "act", forget));
  row.dataset.label = one.label;
  row.dataset.count = one.count;
  return row;
}

function number(value) {
  const cell = element("td", "number");
  cell.textContent = value.toLocaleString();
  return cell;
}

function confirm(label, count) {
  const images = `${count.toLocaleString()} ${count === 1 ? "image" : "images"}`;
  document.getElementById("forget-title").textContent = `Forget “${label}” and its ${images}?`;
  dialog.dataset.label = label;
  dialog.showModal();
}
