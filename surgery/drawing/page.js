"use strict";
const find = document.getElementById("find"), found = document.getElementById("found");
const places = [...document.querySelectorAll(".place")], lines = [...document.querySelectorAll(".alike li")];
const layers = [...document.querySelectorAll(".layer")];
const texts = new Map([...places, ...lines].map((e) => [e, e.textContent.toLowerCase()]));
document.querySelector(".tools").hidden = false;

function search() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const [element, text] of texts) {
    element.hidden = !words.every((word) => text.includes(word));
    count += !element.hidden;
  }
  for (const layer of layers) {
    const alike = layer.querySelector(".alike");
    const left = alike ? [...alike.querySelectorAll("li")].filter((e) => !e.hidden) : [];
    if (alike) {
      alike.hidden = !left.length;
      alike.open = words.length > 0 && left.length > 0;
    }
    layer.hidden = words.length > 0 && !left.length && !layer.querySelector(".place:not([hidden])");
    layer.querySelectorAll(".other").forEach((e) => { e.hidden = words.length > 0; });
  }
  found.textContent = words.length ? `${count} of ${texts.size}` : "";
}

function light(event, on) {
  const from = event.target.closest("[data-n]");
  const pane = from && from.closest(".pane");
  if (!pane) return;
  const numbers = from.dataset.n.split(" ");
  for (const each of pane.querySelectorAll("[data-n]")) {
    if (each.dataset.n.split(" ").some((n) => numbers.includes(n))) each.classList.toggle("hot", on);
  }
}

function reveal() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  const place = target && target.closest(".place");
  if (place) { place.open = true; place.scrollIntoView(); }
}

find.addEventListener("input", search);
find.form.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("pointerover", (event) => light(event, true));
document.addEventListener("pointerout", (event) => light(event, false));
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== find) { event.preventDefault(); find.focus(); }
});
document.getElementById("all").addEventListener("click", (event) => {
  const open = event.target.getAttribute("aria-pressed") !== "true";
  event.target.setAttribute("aria-pressed", String(open));
  event.target.textContent = open ? "Close all" : "Open all";
  places.forEach((place) => { place.open = open; });
});
window.addEventListener("hashchange", reveal);
reveal();
