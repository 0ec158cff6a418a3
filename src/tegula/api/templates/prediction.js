"use strict";

const id = decodeURIComponent(location.pathname.split("/").pop());
const share = new URLSearchParams(location.search).get("share");
const at = (name) => document.getElementById(name);
const url = share ? `/v1/shared/${encodeURIComponent(share)}` : `/v1/predictions/${encodeURIComponent(id)}`;

function links(value) {
  if (typeof value === "string") return /^(https?:|data:image\/)/.test(value) ? [value] : [];
  if (value && typeof value === "object") return Object.values(value).flatMap(links);
  return [];
}

function show(prediction) {
  at("notice").hidden = at("ask").hidden = true;
  at("shown").hidden = false;
  at("model").textContent = `${prediction.model}:${prediction.version.slice(0, 12)}`;
  at("status").textContent = prediction.data_removed ? `${prediction.status}; its data was removed` : prediction.status;
  const { progress, predict_time: seconds } = prediction.metrics;
  at("progress").hidden = progress === undefined;
  if (progress !== undefined) at("progress").value = progress;
  at("time").textContent = seconds === undefined ? "—" : `${seconds.toFixed(1)} s`;
  at("error").textContent = prediction.error || "";
  at("input").textContent = JSON.stringify(prediction.input, null, 2);
  at("logs").textContent = prediction.logs || "";
  const pictures = links(prediction.output).map((address) => {
    const picture = document.createElement("img");
    picture.src = address;
    picture.alt = "Output";
    return picture;
  });
  at("output").replaceChildren(...pictures);
}

async function load() {
  const token = sessionStorage.getItem("token");
  const headers = token && !share ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(url, { headers, cache: "no-store" });
  if (response.status === 401 && !share) {
    at("notice").hidden = true;
    at("ask").hidden = false;
    return;
  }
  const body = await response.json();
  if (!response.ok) {
    at("notice").textContent = body.detail;
    return;
  }
  show(body);
  if (["starting", "processing"].includes(body.status)) setTimeout(load, 1000);
}

at("id").textContent = id;
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value.trim());
  load();
});
load();
