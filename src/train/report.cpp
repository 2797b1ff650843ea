#include "hymoe/train/report.h"

#include <nlohmann/json.hpp>

#include "hymoe/io/file.h"
#include "hymoe/io/jsonl.h"

namespace hymoe {
namespace {

constexpr const char* kHead = R"html(<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>hymoe run</title><style>
body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1080px;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child{text-align:left}.charts{display:flex;flex-wrap:wrap;gap:1em}
figure{margin:0;width:500px}figcaption{font-size:.9em;color:#555}.legend{font-size:.8em;line-height:1.3;display:flex;flex-wrap:wrap;gap:0 .8em}
.maps{display:flex;flex-wrap:wrap;gap:0 2em}.maps p{margin:.8em 0 .2em}.better{color:#0a6b2d}.worse{color:#a3261b}
.heat td{padding:0;width:1.6em;height:1.4em;border:1px solid #fff}.heat td:first-child,.heat th{width:auto;padding:0 .6em;font-weight:normal}
</style></head><body><h1 id="title"></h1><p id="summary"></p><div id="body"></div>
<script id="data" type="application/json">)html";

constexpr const char* kTail = R"html(</script><script>
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const body = document.getElementById('body');
const steps = data.metrics.filter(r => 'lm_loss' in r), evals = data.metrics.filter(r => !('lm_loss' in r));
const colors = ['#1b6ca8', '#c8553d', '#3f8f4f', '#8a4fa3', '#b58900', '#2aa198', '#6c6c6c', '#d33682'];
const fmt = v => Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2) : +v.toPrecision(5) + '';
function element(tag, parent, text, cls) {
  const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (cls) e.className = cls;
  parent.appendChild(e); return e;
}
function svg(tag, parent, attributes) {
  const e = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const k in attributes) e.setAttribute(k, attributes[k]); parent.appendChild(e); return e;
}
function chart(parent, title, series) {
  series = series.map(s => ({name: s.name, points: s.points.filter(p => Number.isFinite(p[1]))})).filter(s => s.points.length);
  if (!series.length) return;
  const W = 500, H = 240, L = 58, R = 8, T = 8, B = 26, all = series.flatMap(s => s.points);
  let x0 = Math.min(...all.map(p => p[0])), x1 = Math.max(...all.map(p => p[0])), y0 = Math.min(...all.map(p => p[1])), y1 = Math.max(...all.map(p => p[1]));
  if (x1 === x0) x1 = x0 + 1; if (y1 === y0) { y1 += Math.abs(y1) * .05 || 1; y0 -= Math.abs(y0) * .05; }
  const x = v => L + (v - x0) / (x1 - x0) * (W - L - R), y = v => H - B - (v - y0) / (y1 - y0) * (H - T - B);
  const figure = element('figure', parent); element('figcaption', figure, title);
  const s = svg('svg', figure, {width: W, height: H, role: 'img', 'aria-label': title});
  for (let i = 0; i <= 4; i++) {
    const v = y0 + (y1 - y0) * i / 4;
    svg('line', s, {x1: L, x2: W - R, y1: y(v), y2: y(v), stroke: '#eee'});
    svg('text', s, {x: L - 6, y: y(v) + 4, 'text-anchor': 'end', 'font-size': 11, fill: '#555'}).textContent = fmt(v);
    const u = x0 + (x1 - x0) * i / 4;
    svg('text', s, {x: x(u), y: H - 8, 'text-anchor': i == 4 ? 'end' : 'middle', 'font-size': 11, fill: '#555'}).textContent = Math.round(u);
  }
  const legend = element('div', figure, undefined, 'legend');
  series.forEach((line, i) => {
    const color = colors[i % colors.length];
    svg('polyline', s, {fill: 'none', stroke: color, 'stroke-width': 1.6, points: line.points.map(p => x(p[0]).toFixed(1) + ',' + y(p[1]).toFixed(1)).join(' ')});
    if (series.length > 1) element('span', legend, line.name).style.color = color;
  });
}
const pick = (rows, key) => ({name: key, points: rows.filter(r => key in r).map(r => [r.step, r[key]])});
const keys = (rows, prefix) => [...new Set(rows.flatMap(r => Object.keys(r).filter(k => k.startsWith(prefix))))];
document.getElementById('title').textContent = 'hymoe run ' + data.name;
const last = steps[steps.length - 1];
document.getElementById('summary').textContent = last ? `${last.step} steps, ${last.tokens} tokens, training loss ${fmt(last.lm_loss)}, ${fmt(last.tokens_per_second)} tokens/s, peak memory ${(last.peak_memory / 2**30).toFixed(2)} GiB` : 'no step logged yet';

const languages = keys(evals, 'loss/').map(k => k.slice(5));
if (languages.length) {
  element('h2', body, 'Held-out loss a language');
  const table = element('table', body), head = element('tr', table);
  ['language', 'first (nats/token)', 'last (nats/token)', 'change', 'first (bits/byte)', 'last (bits/byte)'].forEach(t => element('th', head, t));
  for (const language of languages) {
    const rows = evals.filter(r => 'loss/' + language in r), a = rows[0], b = rows[rows.length - 1], row = element('tr', table);
    const d = b['loss/' + language] - a['loss/' + language];
    element('td', row, language); element('td', row, a['loss/' + language].toFixed(4)); element('td', row, b['loss/' + language].toFixed(4));
    element('td', row, (d > 0 ? '+' : '') + d.toFixed(4), d < 0 ? 'better' : d > 0 ? 'worse' : '');
    for (const r of [a, b]) element('td', row, 'bits_per_byte/' + language in r ? r['bits_per_byte/' + language].toFixed(4) : '');
  }
}
const warnings = new Map();
for (const row of steps) for (const warning of row.warnings ?? []) warnings.has(warning) || warnings.set(warning, row.step);
if (warnings.size) element('h2', body, 'Warnings');
for (const [warning, step] of warnings) element('p', body, `since step ${step}: ${warning}`, 'worse');
element('h2', body, 'Curves');
const charts = element('div', body, undefined, 'charts');
chart(charts, 'training loss (nats/token)', [pick(steps, 'lm_loss')]);
chart(charts, 'held-out loss (nats/token)', languages.map(l => ({...pick(evals, 'loss/' + l), name: l})));
chart(charts, 'auxiliary loss', [pick(steps, 'aux_loss')]);
chart(charts, 'gradient norm', [pick(steps, 'grad_norm')]);
chart(charts, 'learning rate', [pick(steps, 'lr')]);
chart(charts, 'throughput (tokens/s)', [pick(steps, 'tokens_per_second')]);
const titles = {load: 'load (largest / mean)', load_cv: 'load (standard deviation / mean)', load_p10: 'load (10th percentile / mean)', load_p50: 'load (median / mean)',
  load_p90: 'load (90th percentile / mean)', entropy: 'load entropy (1 = even)', dead_experts: 'experts without a row', coverage: 'share of rows with an expert',
  uncovered: 'share of windows without an expert', shared: 'share of windows with several experts', gate_weight: 'mean coefficient of an expert',
  shared_weight: 'mean coefficient of the shared expert', router_entropy: 'router entropy (1 = undecided)', overlap: 'overlap of the branches (0 = independent)',
  dropped: 'share of choices dropped', unrivalled: 'share of choices without a rival (no gradient)', flip_rate: 'share of choices that the predictor misses',
  predictor_loss: 'cross-entropy of the predictor', router_grad: 'gradient of the language-model loss at the routers', router_aux_grad: 'gradient of the auxiliary losses at the routers'};
const names = keys(steps, '').filter(k => k.includes('/')).map(k => k.split('/')[0]);
for (const name of new Set([...Object.keys(titles), ...names]))
  chart(charts, titles[name] ?? name, keys(steps, name + '/').map(k => ({...pick(steps, k), name: k.slice(name.length + 1)})));

const heat = [...evals].reverse().find(r => Object.keys(r).some(k => k.startsWith('rows_per_expert/')));
if (heat) {
  element('h2', body, `Which expert a language uses (step ${heat.step}; share of the language's routed rows)`);
  const maps = {}, grid = element('div', body, undefined, 'maps');
  for (const k of Object.keys(heat)) {
    const m = k.match(/^rows_per_expert\/([^/]+)\/(.+)$/);
    if (m) (maps[m[2]] ??= []).push([m[1], heat[k]]);
  }
  for (const name in maps) {
    const map = element('div', grid);
    element('p', map, name);
    const table = element('table', map, undefined, 'heat');
    for (const [language, counts] of maps[name]) {
      const row = element('tr', table), sum = counts.reduce((a, b) => a + b, 0) || 1; element('td', row, language);
      const top = Math.max(1 / counts.length * 2, ...counts.map(c => c / sum));
      counts.forEach((c, e) => { const cell = element('td', row, ''); cell.style.background = `rgba(27,108,168,${(c / sum / top).toFixed(3)})`; cell.title = `expert ${e}: ${(100 * c / sum).toFixed(1)} %`; });
    }
  }
}
if (data.receipt) {
  element('h2', body, 'Receipt of the starting checkpoint');
  const table = element('table', body);
  for (const k in data.receipt) if (typeof data.receipt[k] !== 'object') { const row = element('tr', table); element('td', row, k); element('td', row, typeof data.receipt[k] === 'number' ? fmt(data.receipt[k]) : data.receipt[k]); }
}
</script></body></html>
)html";

// JSON inside a script element must not close it.
std::string embed(const nlohmann::json& value) {
  std::string text = value.dump();
  for (size_t at = 0; (at = text.find("</", at)) != std::string::npos; at += 3) text.replace(at, 2, "<\\/");
  return text;
}

}  // namespace

void write_report(const std::filesystem::path& run_folder) {
  nlohmann::json data{{"name", run_folder.filename().string()}, {"metrics", nlohmann::json::array()}};
  JsonLines lines(run_folder / "metrics.jsonl");
  for (nlohmann::json row; lines.next(row);) data["metrics"].push_back(row);
  const auto receipt = run_folder / "receipt.json";
  if (std::filesystem::exists(receipt)) data["receipt"] = nlohmann::json::parse(read_text(receipt));
  write_file_atomic(run_folder / "report.html", kHead + embed(data) + kTail);
}

}  // namespace hymoe
