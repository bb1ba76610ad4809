"use strict";
// A notebook: one switch for all code. The gallery: choose and sort the cards. Without it everything is shown.
for (const fold of document.querySelectorAll("button.fold")) {
  const all = document.querySelectorAll("details.code");
  fold.hidden = !all.length;
  fold.addEventListener("click", () => {
    const open = [...all].some((d) => !d.open);
    for (const d of all) d.open = open;
    fold.textContent = open ? "Fold all code" : "Show all code";
  });
}
for (const controls of document.querySelectorAll(".controls")) {
  const list = document.getElementById("runs");
  const cards = [...list.children];
  const first = new Map(cards.map((card, i) => [card, i]));
  const sorting = controls.querySelector(".sort");
  const choosing = [...controls.querySelectorAll(".choose")];
  for (const select of choosing) {
    for (const value of [...new Set(cards.map((card) => card.dataset[select.name]))]) {
      if (value) select.add(new Option(value, value));
    }
  }
  const show = () => {
    for (const card of cards) card.hidden = choosing.some((s) => s.value && card.dataset[s.name] !== s.value);
    const key = sorting.value;
    const number = (card) => (card.dataset[key] === "" || card.dataset[key] === undefined ? -Infinity : Number(card.dataset[key]));
    list.append(...[...cards].sort((a, b) => (key ? number(b) - number(a) : 0) || first.get(a) - first.get(b)));
    const shown = cards.filter((card) => !card.hidden).length;
    controls.querySelector(".shown").textContent = shown === cards.length ? "" : `${shown} of ${cards.length}`;
  };
  controls.addEventListener("change", show);
  controls.hidden = false;
  show();
}
